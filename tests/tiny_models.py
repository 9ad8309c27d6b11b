"""Tiny random models of every architecture, and inputs for them.

Default initial weights hide errors: with them, cross-attention moves the logits by thousandths. Here all weights,
biases and norms are drawn anew, so that it moves them by more than 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    BertModel,
    BigBirdPegasusConfig,
    BigBirdPegasusForConditionalGeneration,
    BlenderbotConfig,
    BlenderbotForConditionalGeneration,
    BlenderbotSmallConfig,
    BlenderbotSmallForConditionalGeneration,
    CamembertConfig,
    CamembertForCausalLM,
    ElectraConfig,
    ElectraForCausalLM,
    EncoderDecoderModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LEDConfig,
    LEDForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForCausalLM,
    MBartForConditionalGeneration,
    MoonshineConfig,
    MoonshineForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    MvpConfig,
    MvpForConditionalGeneration,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PegasusXConfig,
    PegasusXForConditionalGeneration,
    PLBartConfig,
    PLBartForConditionalGeneration,
    Pop2PianoConfig,
    Pop2PianoForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaModel,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    SpeechEncoderDecoderModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
    T5GemmaPreTrainedModel,
    TrOCRConfig,
    TrOCRForCausalLM,
    UMT5Config,
    UMT5ForConditionalGeneration,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XGLMConfig,
    XGLMForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

VOCAB_SIZE, PAD, EOS, START = 99, 0, 1, 2

TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": START, "decoder_start_token_id": START}
BART_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "forced_eos_token_id": None,
    **TOKENS,
}
T5_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    **TOKENS,
}
BERT_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    **TOKENS,
}
GPT2_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    **TOKENS,
}
NO_LAYERDROP = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
DECODER = {"is_decoder": True, "add_cross_attention": True}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model: ``make(overrides)`` returns it with its own initial weights.

    ``modality`` is that of the encoder's input. ``embedding_std``: T5 divides its logits by the root of its width.
    """

    make: Callable[[dict], PreTrainedModel]
    modality: str = "text"
    embedding_std: float = 0.3


def _make_config(config_class: type[PreTrainedConfig], settings: dict, overrides: dict) -> PreTrainedConfig:
    return config_class(**{**settings, **overrides})


def _seq2seq(
    model_class: type[PreTrainedModel],
    config_class: type[PreTrainedConfig],
    settings: dict,
    modality: str = "text",
    **changes,
) -> Family:
    """An encoder-decoder with one configuration."""
    return Family(
        make=lambda overrides: model_class(_make_config(config_class, {**settings, **changes}, overrides)),
        modality=modality,
        embedding_std=1.0 if settings is T5_LIKE else 0.3,
    )


def _joined(
    encoder: tuple[type[PreTrainedModel], type[PreTrainedConfig], dict],
    decoder: tuple[type[PreTrainedModel], type[PreTrainedConfig], dict],
    model_class: type[PreTrainedModel] = EncoderDecoderModel,
    modality: str = "text",
) -> Family:
    """Two models as one; overrides are the decoder's."""

    def make(overrides: dict) -> PreTrainedModel:
        encoder_class, encoder_config, encoder_settings = encoder
        decoder_class, decoder_config, decoder_settings = decoder
        model = model_class(
            encoder=encoder_class(_make_config(encoder_config, encoder_settings, {})),
            decoder=decoder_class(_make_config(decoder_config, {**decoder_settings, **DECODER}, overrides)),
        )
        for config in (model.config, model.generation_config):
            config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = PAD, EOS, START
        return model

    return Family(make, modality)


def _t5gemma(overrides: dict) -> PreTrainedModel:
    """Grouped heads, a soft cap low enough to matter, and an encoder wider than the decoder."""
    shared = {
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "attn_logit_softcapping": 2.0,
        "sliding_window": 64,
        "max_position_embeddings": 64,
        "intermediate_size": 48,
        "dropout_rate": 0.0,
        **TOKENS,
    }
    encoder = T5GemmaModuleConfig(**shared, hidden_size=48, layer_types=["full_attention"] * 2)
    decoder = T5GemmaModuleConfig(
        **shared, hidden_size=32, cross_attention_hidden_size=48, layer_types=["sliding_attention", "full_attention"]
    )
    config = T5GemmaConfig(encoder=encoder, decoder=decoder, vocab_size=VOCAB_SIZE, **{**TOKENS, **overrides})
    T5GemmaPreTrainedModel._supports_sdpa = False  # as since 5.21: before, the soft cap was left out
    return T5GemmaForConditionalGeneration(config)


BERT_ENCODER = (BertModel, BertConfig, BERT_LIKE)
WIDE_BERT_ENCODER = (BertModel, BertConfig, {**BERT_LIKE, "hidden_size": 48})
ROBERTA_LIKE = {**BERT_LIKE, "type_vocab_size": 1}
ROBERTA_ENCODER = (RobertaModel, RobertaConfig, ROBERTA_LIKE)
VIT_ENCODER = (
    ViTModel,
    ViTConfig,
    {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 12,
        "patch_size": 4,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
)
WAV2VEC2_ENCODER = (
    Wav2Vec2Model,
    Wav2Vec2Config,
    {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "conv_dim": (16, 16),
        "conv_kernel": (4, 4),
        "conv_stride": (4, 4),
        "num_feat_extract_layers": 2,
        "feat_extract_norm": "layer",  # a norm over time would see the padding
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.0,
        "layerdrop": 0.0,
        "mask_time_prob": 0.0,
        "mask_feature_prob": 0.0,
    },
)
ADAPTER_WAV2VEC2_ENCODER = (
    Wav2Vec2Model,
    Wav2Vec2Config,
    {**WAV2VEC2_ENCODER[2], "add_adapter": True, "num_adapter_layers": 1, "output_hidden_size": 32},
)
TROCR_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    **TOKENS,
}
XGLM_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 32,
    "num_layers": 2,
    "attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    **TOKENS,
}
AUDIO = {"max_source_positions": 32, "max_target_positions": 64}

_FAMILIES: dict[str, Family] = {
    # Encoder-decoders of text
    "bart": _seq2seq(BartForConditionalGeneration, BartConfig, BART_LIKE),
    "mbart": _seq2seq(MBartForConditionalGeneration, MBartConfig, BART_LIKE),
    "marian": _seq2seq(MarianMTModel, MarianConfig, BART_LIKE, forced_eos_token_id=EOS),
    "pegasus": _seq2seq(PegasusForConditionalGeneration, PegasusConfig, BART_LIKE),
    "pegasus_x": _seq2seq(PegasusXForConditionalGeneration, PegasusXConfig, BART_LIKE, block_size=4),
    "bigbird_pegasus": _seq2seq(BigBirdPegasusForConditionalGeneration, BigBirdPegasusConfig, BART_LIKE),
    "blenderbot": _seq2seq(BlenderbotForConditionalGeneration, BlenderbotConfig, BART_LIKE),
    "blenderbot_small": _seq2seq(BlenderbotSmallForConditionalGeneration, BlenderbotSmallConfig, BART_LIKE),
    "m2m_100": _seq2seq(M2M100ForConditionalGeneration, M2M100Config, BART_LIKE, **NO_LAYERDROP),
    "nllb_moe": _seq2seq(
        NllbMoeForConditionalGeneration,
        NllbMoeConfig,
        BART_LIKE,
        **NO_LAYERDROP,
        num_experts=2,
        expert_capacity=1000,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        router_jitter_noise=0.0,
        moe_token_dropout=0.0,
    ),
    "plbart": _seq2seq(PLBartForConditionalGeneration, PLBartConfig, BART_LIKE),
    "mvp": _seq2seq(MvpForConditionalGeneration, MvpConfig, BART_LIKE),
    "led": _seq2seq(
        LEDForConditionalGeneration,
        LEDConfig,
        BART_LIKE,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        attention_window=4,
    ),
    "t5": _seq2seq(T5ForConditionalGeneration, T5Config, T5_LIKE),
    "mt5": _seq2seq(MT5ForConditionalGeneration, MT5Config, T5_LIKE),
    "umt5": _seq2seq(UMT5ForConditionalGeneration, UMT5Config, T5_LIKE),
    "longt5": _seq2seq(LongT5ForConditionalGeneration, LongT5Config, T5_LIKE, local_radius=3),
    "switch_transformers": _seq2seq(
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig,
        T5_LIKE,
        num_experts=2,
        expert_capacity=1000,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        router_jitter_noise=0.0,
    ),
    "pop2piano": _seq2seq(Pop2PianoForConditionalGeneration, Pop2PianoConfig, T5_LIKE, modality="embeddings"),
    "t5gemma": Family(_t5gemma, embedding_std=0.05),
    "prophetnet": _seq2seq(
        ProphetNetForConditionalGeneration,
        ProphetNetConfig,
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            **TOKENS,
        },
    ),
    "fsmt": _seq2seq(
        FSMTForConditionalGeneration,
        FSMTConfig,
        BART_LIKE,
        langs=["en", "de"],
        src_vocab_size=VOCAB_SIZE,
        tgt_vocab_size=VOCAB_SIZE,
    ),
    # Two text models joined
    "bert2bert": _joined(BERT_ENCODER, (BertLMHeadModel, BertConfig, BERT_LIKE)),
    "wide_bert2bert": _joined(WIDE_BERT_ENCODER, (BertLMHeadModel, BertConfig, BERT_LIKE)),
    "bert2gpt2": _joined(BERT_ENCODER, (GPT2LMHeadModel, GPT2Config, GPT2_LIKE)),
    "roberta2roberta": _joined(ROBERTA_ENCODER, (RobertaForCausalLM, RobertaConfig, ROBERTA_LIKE)),
    "bert2xlm_roberta": _joined(BERT_ENCODER, (XLMRobertaForCausalLM, XLMRobertaConfig, ROBERTA_LIKE)),
    "bert2camembert": _joined(BERT_ENCODER, (CamembertForCausalLM, CamembertConfig, ROBERTA_LIKE)),
    "bert2electra": _joined(BERT_ENCODER, (ElectraForCausalLM, ElectraConfig, {**BERT_LIKE, "embedding_size": 24})),
    "bert2bert_generation": _joined(BERT_ENCODER, (BertGenerationDecoder, BertGenerationConfig, BERT_LIKE)),
    "bert2xglm": _joined(BERT_ENCODER, (XGLMForCausalLM, XGLMConfig, XGLM_LIKE)),
    # Audio
    "whisper": _seq2seq(
        WhisperForConditionalGeneration,
        WhisperConfig,
        BART_LIKE,
        **AUDIO,
        num_mel_bins=8,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        modality="features",
    ),
    "speech_to_text": _seq2seq(
        Speech2TextForConditionalGeneration,
        Speech2TextConfig,
        BART_LIKE,
        **AUDIO,
        input_feat_per_channel=8,
        conv_kernel_sizes=(3, 3),
        conv_channels=16,
        modality="features",
    ),
    "moonshine": _seq2seq(
        MoonshineForConditionalGeneration,
        MoonshineConfig,
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "max_position_embeddings": 64,
            **TOKENS,
        },
        modality="waveform",
    ),
    "wav2vec2_to_bert": _joined(
        WAV2VEC2_ENCODER,
        (BertLMHeadModel, BertConfig, BERT_LIKE),
        SpeechEncoderDecoderModel,
        modality="waveform",
    ),
    "wav2vec2_to_mbart": _joined(
        ADAPTER_WAV2VEC2_ENCODER,
        (MBartForCausalLM, MBartConfig, BART_LIKE),
        SpeechEncoderDecoderModel,
        modality="waveform",
    ),
    # Images
    "vit2trocr": _joined(
        VIT_ENCODER, (TrOCRForCausalLM, TrOCRConfig, TROCR_LIKE), VisionEncoderDecoderModel, modality="image"
    ),
    "vit2gpt2": _joined(
        VIT_ENCODER, (GPT2LMHeadModel, GPT2Config, GPT2_LIKE), VisionEncoderDecoderModel, modality="image"
    ),
}
FAMILIES: list[str] = list(_FAMILIES)

# Families whose self-attention no spec can describe, by the kind of attention; all others have one.
REFUSED = {
    "encoder": {
        "pegasus_x",
        "bigbird_pegasus",
        "mvp",
        "led",
        "longt5",
        "t5gemma",
        "prophetnet",
        "fsmt",
        "moonshine",
    },
    "decoder": {"mvp", "led", "t5gemma", "prophetnet", "fsmt", "moonshine", "bert2xglm", "vit2trocr"},
}

# As they are called in the table of architectures.
TITLES = {
    "bart": "BART",
    "mbart": "mBART",
    "marian": "Marian",
    "pegasus": "Pegasus",
    "pegasus_x": "PEGASUS-X",
    "bigbird_pegasus": "BigBird-Pegasus",
    "blenderbot": "Blenderbot",
    "blenderbot_small": "Blenderbot Small",
    "m2m_100": "M2M100, NLLB",
    "nllb_moe": "NLLB-MoE",
    "plbart": "PLBart",
    "mvp": "MVP",
    "led": "LED",
    "t5": "T5",
    "mt5": "mT5",
    "umt5": "UMT5",
    "longt5": "LongT5",
    "switch_transformers": "Switch Transformers",
    "pop2piano": "Pop2Piano",
    "t5gemma": "T5Gemma",
    "prophetnet": "ProphetNet",
    "fsmt": "FSMT",
    "bert2bert": "BERT to BERT",
    "wide_bert2bert": "BERT to a narrower BERT",
    "bert2gpt2": "BERT to GPT-2",
    "roberta2roberta": "RoBERTa to RoBERTa",
    "bert2xlm_roberta": "BERT to XLM-RoBERTa",
    "bert2camembert": "BERT to CamemBERT",
    "bert2electra": "BERT to ELECTRA",
    "bert2bert_generation": "BERT to BertGeneration",
    "bert2xglm": "BERT to XGLM",
    "whisper": "Whisper",
    "speech_to_text": "Speech2Text",
    "moonshine": "Moonshine",
    "wav2vec2_to_bert": "Wav2Vec2 to BERT",
    "wav2vec2_to_mbart": "Wav2Vec2 with an adapter to mBART",
    "vit2trocr": "ViT to TrOCR",
    "vit2gpt2": "ViT to GPT-2",
}


def tiny_base(family: str, seed: int = 0, **config_overrides) -> PreTrainedModel:
    """A tiny random model in ``eval()``; ``config_overrides`` go to the configuration (the decoder's of two)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _FAMILIES[family].make(config_overrides)
        _draw_weights(model, _FAMILIES[family].embedding_std)
    return model.eval()


@torch.no_grad()
def _draw_weights(model: nn.Module, embedding_std: float) -> None:
    """Weights that keep the size of activations, biases and norms that are not trivial."""
    drawn = set()
    for name, module in model.named_modules():
        queries_or_keys = name.rsplit(".", 1)[-1].startswith(("q", "k")) or name.endswith("attn.c_attn")
        for parameter in module.parameters(recurse=False):
            if parameter in drawn or not parameter.requires_grad:
                continue
            drawn.add(parameter)
            if parameter.dim() < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif isinstance(module, nn.Embedding):
                parameter.normal_(std=embedding_std)
                if module.padding_idx is not None:
                    parameter[module.padding_idx].zero_()
            else:
                fan_in = parameter.shape[0] if isinstance(module, Conv1D) else parameter[0].numel()
                parameter.normal_(std=(1.0 if queries_or_keys else 2.5) * fan_in**-0.5)


# What a source of length 1 is made of, and how much of it the convolutions of a tiny model turn into one vector.
_FRAMES = {"speech_to_text": 4, "moonshine": 384, "wav2vec2_to_bert": 16, "wav2vec2_to_mbart": 32}


def tiny_inputs(family: str, batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """The encoder's inputs, padded on the right to the length of the first, with their mask."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([(9, 5, 7)[row % 3] for row in range(batch)])
    modality = _FAMILIES[family].modality
    if modality == "image":
        return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=generator)}
    if modality == "text":
        input_ids, mask = _tokens(lengths, generator)
        inputs = {"input_ids": input_ids, "attention_mask": mask.long()}
        if family == "led":
            inputs["global_attention_mask"] = torch.zeros_like(input_ids)
            inputs["global_attention_mask"][:, 0] = 1
        return inputs
    if modality == "embeddings":
        mask = torch.arange(9) < lengths[:, None]
        return {"inputs_embeds": torch.randn(batch, 9, 32, generator=generator), "attention_mask": mask.long()}
    if family == "whisper":  # sound is padded to a fixed length, which is not masked
        return {"input_features": torch.randn(batch, 8, 64, generator=generator)}
    mask = torch.arange(9 * _FRAMES[family]) < lengths[:, None] * _FRAMES[family]
    size = (*mask.shape, 8) if modality == "features" else mask.shape
    sound = torch.randn(size, generator=generator)
    sound = sound * (mask[..., None] if modality == "features" else mask)
    name = "input_features" if modality == "features" else "input_values"
    return {name: sound, "attention_mask": mask.long()}


def tiny_labels(family: str, batch: int = 3, seed: int = 0) -> Tensor:
    """Targets ``(batch, 6)`` that end with EOS, padded with -100."""
    generator = torch.Generator().manual_seed(1000 + seed)
    lengths = torch.tensor([(4, 6, 3)[row % 3] for row in range(batch)])
    labels, mask = _tokens(lengths, generator)
    return labels.masked_fill(~mask, -100)


def _tokens(lengths: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens of these lengths, EOS last, then PAD; and where they are no padding."""
    size = (len(lengths), int(lengths.max()))
    tokens = torch.randint(START + 1, VOCAB_SIZE, size, generator=generator)
    position = torch.arange(size[1])
    tokens = tokens.masked_fill(position == lengths[:, None] - 1, EOS)
    mask = position < lengths[:, None]
    return tokens.masked_fill(~mask, PAD), mask


def decoder_inputs(batch: int = 3, length: int = 6) -> Tensor:
    """Tokens ``(batch, length)`` for a decoder to read."""
    tokens = torch.randint(START + 1, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(7))
    tokens[:, 0] = START
    return tokens


def row_of(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One example by itself, without its padding."""
    mask = inputs.get("attention_mask")
    single = {name: value[row : row + 1] for name, value in inputs.items()}
    if mask is None:
        return single
    length = int(mask[row].sum())
    return {name: value[:, :length] for name, value in single.items()}


def checkpoint_layers(model: PreTrainedModel, settings: dict) -> None:
    """Turn gradient checkpointing on, by the name that it has in this version of Transformers."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(settings)
