"""The table of cross-attention: an architecture of one's own, what is refused, and what conversion leaves alone."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny_models import (
    BERT_ENCODER,
    BERT_LIKE,
    DECODER,
    EOS,
    PAD,
    START,
    VOCAB_SIZE,
    tiny_base,
    tiny_inputs,
    tiny_labels,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    EncoderDecoderModel,
    ErnieConfig,
    ErnieForCausalLM,
    GenerationMixin,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.bart.modeling_bart import BartAttention
from transformers.pytorch_utils import Conv1D

from nvib_hf import CrossAttention, NvibForConditionalGeneration, register_cross_attention
from nvib_hf.layers.denoising_attention import attended_mixture, pack
from nvib_hf.versions import CACHE, TESTED_TRANSFORMERS
from nvib_hf.wrapping import specs
from nvib_hf.wrapping.cross_attention import (
    DenoisingCrossAttention,
    convert_cross_attention,
    projection_matrix,
    restore_cross_attention,
)
from nvib_hf.wrapping.specs import BERT, attended_width, attention_scale, find_cross_attention


@pytest.fixture
def registry(monkeypatch):
    """The table, restored after the test."""
    monkeypatch.setattr(specs, "_REGISTRY", dict(specs._REGISTRY))
    return specs._REGISTRY


# ------------------------------------------------------------------------------------ an architecture of one's own
class PaperConfig(PreTrainedConfig):
    model_type = "paper"
    vocab_size: int = VOCAB_SIZE
    width: int = 24
    heads: int = 3
    is_encoder_decoder: bool = True
    pad_token_id: int = PAD
    eos_token_id: int = EOS
    decoder_start_token_id: int = START


class PaperSourceAttention(nn.Module):
    """Cross-attention as somebody else would write it."""

    def __init__(self, config: PaperConfig):
        super().__init__()
        self.per_head = config.width // config.heads
        self.temperature = 0.3
        self.to_q = nn.Linear(config.width, config.width)
        self.to_kv = nn.Linear(config.width, 2 * config.width)
        self.to_out = nn.Linear(config.width, config.width)
        self.drop = nn.Dropout(0.0)

    def forward(self, x, source, source_mask=None):
        key, value = self.to_kv(source).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (-1, self.per_head)).transpose(1, 2) for t in (self.to_q(x), key, value))
        scores = self.temperature * query @ key.transpose(-1, -2)
        if source_mask is not None:
            scores = scores.masked_fill(source_mask[:, None, None] == 0, float("-inf"))
        weights = self.drop(scores.softmax(-1))
        return self.to_out((weights @ value).transpose(1, 2).flatten(2)), weights


class PaperEncoder(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, config: PaperConfig):
        super().__init__()
        self.config, self.embedding = config, nn.Embedding(config.vocab_size, config.width)
        self.mix = nn.Linear(config.width, config.width)

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return BaseModelOutput(last_hidden_state=torch.tanh(self.mix(self.embedding(input_ids))))


class PaperDecoder(nn.Module):
    def __init__(self, config: PaperConfig):
        super().__init__()
        self.config, self.embedding = config, nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(nn.ModuleDict({"reads_source": PaperSourceAttention(config)}) for _ in range(2))

    def forward(self, input_ids, source, source_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer["reads_source"](x, source, source_mask)[0]
        return x


class PaperForTranslation(PreTrainedModel, GenerationMixin):
    config_class = PaperConfig
    base_model_prefix = "paper"
    _supports_sdpa = True

    def __init__(self, config: PaperConfig):
        super().__init__(config)
        self.encoder, self.decoder = PaperEncoder(config), PaperDecoder(config)
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_encoder(self, modality=None):
        return self.encoder

    def get_decoder(self):
        return self.decoder

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        encoder_outputs=None,
        use_cache=None,
        return_dict=True,
        **kwargs,
    ):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        states = self.decoder(decoder_input_ids, encoder_outputs[0], attention_mask)
        return Seq2SeqLMOutput(logits=self.head(states))


def paper_model() -> PaperForTranslation:
    model = PaperForTranslation(PaperConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def test_an_architecture_of_ones_own(registry, tmp_path):
    """All it takes: one row, and the two calls with which Transformers itself learns of a model."""
    with pytest.raises(ValueError, match=r"PaperForTranslation has no cross-attention.*register_cross_attention"):
        NvibForConditionalGeneration.from_base_pretrained(paper_model())

    register_cross_attention(
        CrossAttention(
            place="reads_source",
            query="to_q",
            key=None,
            value=None,
            key_value="to_kv",
            output="to_out",
            head_dim="per_head",
            scale="temperature",
            dropout="drop",
            hidden_states="x",
            memory="source",
            cache=None,
        ),
        "PaperSourceAttention",
    )
    AutoConfig.register("paper", PaperConfig, exist_ok=True)
    AutoModelForSeq2SeqLM.register(PaperConfig, PaperForTranslation, exist_ok=True)

    base, inputs, labels = paper_model(), tiny_inputs("bart"), tiny_labels("bart")
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base))
    assert model.scale == 0.3
    tokens = model.prepare_decoder_input_ids_from_labels(labels)
    expected = base(**inputs, decoder_input_ids=tokens).logits
    torch.testing.assert_close(model(**inputs, decoder_input_ids=tokens).logits, expected, atol=1e-3, rtol=0)
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": False}
    assert torch.equal(model.generate(**inputs, **settings), base.generate(**inputs, **settings))

    model.train()(**inputs, labels=labels).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(
        loaded(**inputs, decoder_input_ids=tokens).logits, model(**inputs, decoder_input_ids=tokens).logits
    )


def test_a_row_may_name_the_python_module_of_a_class(registry):
    """Two classes called Attention are told apart by it."""
    module = type("Attention", (nn.Module,), {"__module__": "somewhere.modeling_paper"})()
    module.q, module.k = nn.Linear(4, 4), nn.Linear(6, 4)
    model = nn.Module()
    model.encoder_attn, model.config = module, SimpleNamespace()
    assert type(module).__name__ == type(tiny_base("fsmt").model.decoder.layers[0].encoder_attn).__name__
    with pytest.raises(ValueError, match=r"Attention \(encoder_attn\)"):
        find_cross_attention(model)
    register_cross_attention(CrossAttention(place="encoder_attn", key="k"), "modeling_paper.Attention")
    (found,) = find_cross_attention(model)
    assert found[0] is module and attended_width(*found) == 6


# ------------------------------------------------------------------------------------ what is refused
def test_an_unknown_cross_attention_is_named_and_a_row_makes_it_work(registry):
    ernie = ErnieForCausalLM(ErnieConfig(**BERT_LIKE, **DECODER))
    encoder_class, config_class, settings = BERT_ENCODER
    base = EncoderDecoderModel(encoder=encoder_class(config_class(**settings)), decoder=ernie)
    for config in (base.config, base.generation_config):
        config.pad_token_id, config.decoder_start_token_id = PAD, START
    with pytest.raises(ValueError, match=r"not in the table: .*ErnieCrossAttention .*register_cross_attention"):
        NvibForConditionalGeneration.from_base_pretrained(base)
    register_cross_attention(BERT, "ErnieCrossAttention")
    inputs, labels = tiny_inputs("bart"), tiny_labels("bart")
    assert NvibForConditionalGeneration.from_base_pretrained(base)(**inputs, labels=labels).loss.isfinite()


def test_t5gemma2_is_refused():
    config = T5Gemma2Config()
    for part in (config.encoder.text_config, config.decoder):
        part.num_hidden_layers, part.layer_types = 1, part.layer_types[:1]
    config.encoder.vision_config.num_hidden_layers = 1
    with torch.device("meta"):
        base = T5Gemma2ForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"T5Gemma2MergedAttention cannot become .* in one softmax.* Take T5Gemma"):
        NvibForConditionalGeneration.from_base_pretrained(base)


def test_gptbigcode_is_refused_as_a_decoder():
    sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 1, "n_head": 4, "multi_query": False}
    decoder = GPTBigCodeForCausalLM(GPTBigCodeConfig(**sizes, **DECODER))
    encoder_class, config_class, settings = BERT_ENCODER
    base = EncoderDecoderModel(encoder=encoder_class(config_class(**settings)), decoder=decoder)
    with pytest.raises(ValueError, match=r"GPTBigCodeAttention cannot become .* Take a GPT-2 decoder"):
        NvibForConditionalGeneration.from_base_pretrained(base)


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)),
        LlamaForCausalLM(
            LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ),
    ],
    ids=["gpt2", "llama"],
)
def test_a_decoder_only_model_is_refused(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no cross-attention.*from_encoder_decoder"):
        NvibForConditionalGeneration.from_base_pretrained(model)


def test_trained_prompts_are_refused():
    with pytest.raises(ValueError, match=r"MvpForConditionalGeneration with use_prompt=True.*use_prompt=False"):
        NvibForConditionalGeneration.from_base_pretrained(tiny_base("mvp", use_prompt=True, prompt_length=3))


def test_scales_that_differ_between_layers_are_refused():
    base = tiny_base("bert2gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match=r"different scales.*scale_attn_by_inverse_layer_idx=False"):
        NvibForConditionalGeneration.from_base_pretrained(base)


def test_states_that_are_no_latent_are_refused():
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"))
    states = torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="encoder_hidden_states is 32 wide where a latent of this model is 40 or 72"):
        model.base(encoder_outputs=(states,), decoder_input_ids=torch.tensor([[START]]))
    with pytest.raises(ValueError, match="DenoisingBartAttention got no key_value_states: the latent is missing"):
        model.base.model.decoder.layers[0].encoder_attn(states)


# ------------------------------------------------------------------------------------ names that have moved
@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("hidden_states", "hidden_state", "forward takes no argument 'hidden_state' "),
        ("memory", "key_value_state", "forward takes no argument 'key_value_state' "),
        ("cache", "kv_cache", "forward takes no argument 'kv_cache' "),
        ("returns", ("output", "weights", "position_bias"), "forward takes no argument 'position_bias' "),
        ("query", "query_proj", "no attribute 'query_proj'"),
        ("key", "key_proj", "no attribute 'key_proj'"),
        ("value", "value_proj", "no attribute 'value_proj'"),
        ("output", "o_proj", "no attribute 'o_proj'"),
        ("head_dim", "head_width", "no attribute 'head_width'"),
        ("scale", "scale", "no attribute 'scale'"),
        ("dropout", "dropout_p", "no attribute 'dropout_p'"),
        ("output_dropout", "resid", "no attribute 'resid'"),
        ("softcap", "cap", "no attribute 'cap'"),
    ],
)
def test_a_row_whose_names_are_not_there_is_refused(registry, field, name, message):
    base, inputs, labels = tiny_base("bart"), tiny_inputs("bart"), tiny_labels("bart")
    expected = base(**inputs, labels=labels).logits
    register_cross_attention(replace(specs.BART, **{field: name}), "BartAttention")
    with pytest.raises(ValueError, match=message) as error:
        NvibForConditionalGeneration.from_base_pretrained(base)
    assert "BartAttention" in str(error.value)
    assert transformers.__version__ in str(error.value)
    assert TESTED_TRANSFORMERS in str(error.value)
    assert torch.equal(base(**inputs, labels=labels).logits, expected)  # nothing was changed


class RenamedAttention(BartAttention):
    """What a release of Transformers may do: another name for the cache, and the old one swallowed."""

    def forward(self, hidden_states, key_value_states=None, attention_mask=None, remembered=None, **kwargs):
        return super().forward(hidden_states, key_value_states, attention_mask=attention_mask, **{CACHE: remembered})


def renamed_model():
    base = tiny_base("bart")
    for layer in base.model.decoder.layers:
        layer.encoder_attn.__class__ = RenamedAttention
    return base


def test_a_forward_that_was_renamed_is_refused(registry):
    register_cross_attention(specs.BART, "RenamedAttention")
    with pytest.raises(ValueError, match=f"RenamedAttention.* takes no argument '{CACHE}' .*register_cross_attention"):
        NvibForConditionalGeneration.from_base_pretrained(renamed_model())


def test_a_decoder_that_hands_the_cache_on_under_another_name_is_refused(registry):
    """The attention takes what its row says, but its caller says something else: nothing else would notice."""
    register_cross_attention(replace(specs.BART, cache="remembered"), "RenamedAttention")
    model, inputs = NvibForConditionalGeneration.from_base_pretrained(renamed_model()), tiny_inputs("bart")
    with pytest.raises(RuntimeError, match=r"cache did not reach the cross-attention of layers \[0, 1\]"):
        model.generate(**inputs, max_new_tokens=3)
    model.generate(**inputs, max_new_tokens=3, use_cache=False)


def test_a_model_that_takes_no_cache_under_its_name_is_refused(registry):
    base = tiny_base("bart")
    forward = type(base).forward

    def renamed(self, decoder_input_ids=None, encoder_outputs=None, remembered=None):
        return forward(self, decoder_input_ids=decoder_input_ids, encoder_outputs=encoder_outputs)

    base.__class__ = type("RenamedBart", (type(base),), {"forward": renamed})
    with pytest.raises(ValueError, match=f"RenamedBart.forward takes no argument '{CACHE}'"):
        NvibForConditionalGeneration.from_base_pretrained(base)


# ------------------------------------------------------------------------------------ what conversion leaves alone
def test_conversion_keeps_names_classes_and_self_attention():
    base = tiny_base("bart")
    names = list(base.state_dict())
    kinds = {name: type(module) for name, module in base.named_modules()}
    modules = find_cross_attention(base)
    convert_cross_attention(modules, 32, 8**-0.5)
    assert list(base.state_dict()) == names
    for name, module in base.named_modules():
        assert isinstance(module, kinds[name])
        assert isinstance(module, DenoisingCrossAttention) == name.endswith("encoder_attn")
    restore_cross_attention(base)
    assert {name: type(module) for name, module in base.named_modules()} == kinds


@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2", "t5gemma"])
@torch.no_grad()
def test_unwrapping_gives_the_base_back(family):
    base, inputs, tokens = tiny_base(family), tiny_inputs(family), torch.tensor([[START, 5, 6]]).expand(3, -1)
    expected = base(**inputs, decoder_input_ids=tokens).logits
    settings = {"evaluation": "mixture", "tau_alpha": 0.0, "tau_sigma": 0.5}
    model = NvibForConditionalGeneration.from_base_pretrained(base, **settings)
    assert (model(**inputs, decoder_input_ids=tokens).logits - expected).abs().max() > 1e-2
    assert torch.equal(model.unwrap()(**inputs, decoder_input_ids=tokens).logits, expected)


def test_scale_and_width_are_read_from_the_module():
    for family, scale, width in (
        ("bart", 8**-0.5, 32),
        ("t5", 1.0, 32),
        ("t5gemma", 6**-0.5, 48),
        ("bert2gpt2", 8**-0.5, 32),
    ):
        modules = find_cross_attention(tiny_base(family))
        assert {attention_scale(module, spec) for module, spec in modules} == {scale}
        assert {attended_width(module, spec) for module, spec in modules} == {width}
        convert_cross_attention(modules, width, scale)
        assert {attention_scale(module, spec) for module, spec in modules} == {scale}


# ------------------------------------------------------------------------------------ matrices and the cache
class Opaque(nn.Module):
    """A linear map whose matrix cannot be read, like a quantised one."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.apply_to, self.in_features = [linear], linear.in_features

    def forward(self, x):
        return self.apply_to[0](x)


@torch.no_grad()
def test_the_matrix_of_a_projection_is_what_it_does():
    linear, like = nn.Linear(5, 3), torch.zeros(1, 2, 5)
    assert projection_matrix(linear, like) is linear.weight
    torch.testing.assert_close(projection_matrix(Opaque(linear), like), linear.weight)
    conv = Conv1D(3, 5)
    nn.init.normal_(conv.bias)
    torch.testing.assert_close(projection_matrix(conv, like), conv.weight.T)
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(projection_matrix(linear, like), 2 * linear.weight)


@torch.no_grad()
def test_matrices_are_computed_once_a_source():
    """Keys, values and the matrices of the projections: at the first decoding step, and again for another source."""
    ((module, spec), _) = find_cross_attention(tiny_base("bart"))
    calls = []
    module.k_proj = Opaque(module.k_proj)
    module.k_proj.register_forward_hook(lambda *_: calls.append(1))
    convert_cross_attention([(module, spec)], 32, 8**-0.5)
    mu, logvar = torch.randn(2, 1, 4, 32)
    packed = pack(attended_mixture(mu, logvar, torch.zeros(1, 4), 8**-0.5))
    hidden_states = torch.randn(1, 3, 32)
    together = module(hidden_states, packed)[0]
    calls.clear()
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    steps = [module(hidden_states[:, step : step + 1], packed, **{CACHE: cache})[0] for step in range(3)]
    assert len(calls) == 3  # the keys; the identity and zero
    torch.testing.assert_close(torch.cat(steps, dim=1), together)


@torch.no_grad()
def test_a_cache_that_is_used_again_does_not_keep_old_matrices():
    ((module, spec), _) = find_cross_attention(tiny_base("bert2gpt2"))
    convert_cross_attention([(module, spec)], 32, 8**-0.5)
    mu, logvar = torch.randn(2, 1, 4, 32)
    packed, hidden_states = pack(attended_mixture(mu, logvar, torch.zeros(1, 4), 8**-0.5)), torch.randn(1, 1, 32)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    module(hidden_states, encoder_hidden_states=packed, **{CACHE: cache})
    module.c_attn.weight.mul_(0.5)
    cache.is_updated.clear()
    layer = cache.cross_attention_cache.layers[0]
    layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
    again = module(hidden_states, encoder_hidden_states=packed, **{CACHE: cache})[0]
    torch.testing.assert_close(again, module(hidden_states, encoder_hidden_states=packed)[0])


# ------------------------------------------------------------------------------------ around the encoder
def test_whisper_masks_its_sound_in_training_as_the_base_does():
    base = tiny_base("whisper", apply_spec_augment=True, mask_time_prob=0.5, mask_time_length=4)
    model, inputs = NvibForConditionalGeneration.from_base_pretrained(base), tiny_inputs("whisper")
    seen, before = [], inputs["input_features"].clone()
    base.model.encoder.conv1.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model.eval().encode(**inputs)
    model.train().encode(**inputs)
    silent = [(sound == 0).all(dim=1).any().item() for sound in seen]
    assert silent == [False, True]
    assert torch.equal(inputs["input_features"], before)
