"""Texts to latents and back against single texts, and how long a text may be."""

import doctest

import pytest
import torch
from tiny_models import EOS, tiny_base
from tiny_nvib import tiny_nvib
from tiny_text import tiny_tokenizer

import nvib_hf
from nvib_hf import decode_latents, encode_texts, evaluate, reconstruct
from nvib_hf.evaluation import texts as module
from nvib_hf.evaluation.rate_distortion import rate_distortion
from nvib_hf.evaluation.texts import as_read, labels_of, length_limit

TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w5 w5 w90", "w20 w21", "w5 w40 w41 w42"]
TOKENIZER = tiny_tokenizer()


def ids(text: str) -> torch.Tensor:
    return torch.tensor([TOKENIZER(text).input_ids])


# ------------------------------------------------------------------------------------------------ texts to latents
@pytest.mark.parametrize("batch_size", [2, 64])
def test_latents_are_those_of_single_texts_in_order(batch_size):
    model = tiny_nvib(alpha_threshold=830.0).train()  # some vectors are below the threshold
    latents = encode_texts(model, TOKENIZER, TEXTS, batch_size=batch_size)
    assert model.training and len(latents) == len(TEXTS) and not latents.z.requires_grad
    for row, text in zip(latents, TEXTS, strict=True):
        alone = model.eval().encode(ids(text))
        torch.testing.assert_close(row.z[row.attention_mask], alone.z[alone.attention_mask])
        torch.testing.assert_close(row.log_pi[row.attention_mask], alone.log_pi[alone.attention_mask])
        torch.testing.assert_close(row.num_vectors, alone.num_vectors)


def test_a_sample_follows_its_generator():
    model = tiny_nvib()
    drawn = [
        encode_texts(model, TOKENIZER, TEXTS, sample=True, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    expected = model.encode(
        **TOKENIZER(TEXTS, padding=True, return_tensors="pt"),
        sample=True,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(drawn[0].z, expected.z) and torch.equal(drawn[0].z, drawn[1].z)
    assert not torch.equal(drawn[0].z, drawn[2].z)
    assert not torch.equal(drawn[0].z, encode_texts(model, TOKENIZER, TEXTS).z)


@pytest.mark.parametrize("function", [encode_texts, reconstruct])
def test_what_is_no_list_of_texts_is_refused(function):
    for texts in ("w5 w6", []):
        with pytest.raises(ValueError, match="texts must be a list of at least one text"):
            function(tiny_nvib(), TOKENIZER, texts)


# ------------------------------------------------------------------------------------------------- latents to texts
def test_texts_of_latents_are_those_of_generate_in_order():
    model = tiny_nvib()
    latents = model.sample_latents(5, [3, 6, 4, 2, 5], generator=torch.Generator().manual_seed(0))
    expected = []
    for row in latents:
        tokens = model.generate(encoder_outputs=row, max_new_tokens=7)
        expected.append(TOKENIZER.decode(tokens[0], skip_special_tokens=True).strip())
    model.train()
    assert decode_latents(model, TOKENIZER, latents, max_length=7, batch_size=2) == expected
    assert model.training and len(set(expected)) > 1
    assert decode_latents(model, TOKENIZER, latents[1], max_length=7) == expected[1:2]
    beams = model.eval().generate(encoder_outputs=latents, max_new_tokens=7, num_beams=4)
    written = [text.strip() for text in TOKENIZER.batch_decode(beams, skip_special_tokens=True)]
    assert decode_latents(model, TOKENIZER, latents, max_length=7, num_beams=4) == written


def test_to_latents_and_back_is_a_reconstruction():
    model = tiny_nvib()
    back = decode_latents(model, TOKENIZER, encode_texts(model, TOKENIZER, TEXTS), max_length=9)
    assert back == reconstruct(model, TOKENIZER, TEXTS, max_length=9)


# ------------------------------------------------------------------------------------------------------ how long
def test_the_limit_is_the_least_of_the_tokenizers_and_the_models():
    bart = tiny_base("bart", max_position_embeddings=40)
    wrapped = tiny_nvib(base={"max_position_embeddings": 40})
    assert length_limit(bart, tiny_tokenizer()) == length_limit(wrapped, tiny_tokenizer()) == 40
    short = tiny_tokenizer()
    short.model_max_length = 6
    assert length_limit(wrapped, short) == 6
    assert length_limit(tiny_base("t5"), tiny_tokenizer()) == 512
    assert length_limit(tiny_base("t5"), short) == 6


@pytest.mark.parametrize("unlimited", [10**30, int(1e30), 10**18])
def test_a_length_without_limit_is_the_models(unlimited):
    """A tokenizer that was saved without a limit has such a number, which no tokenizer takes as a length to cut to."""
    tokenizer, model, texts = tiny_tokenizer(), tiny_nvib(), TEXTS
    tokenizer.model_max_length = unlimited
    with torch.no_grad():
        model.base.final_logits_bias[0, EOS] = -1e4  # no text ends by itself: the decoder's positions end it
    given, own = {"max_length": tokenizer.model_max_length}, {"max_length": length_limit(model, TOKENIZER)}
    assert length_limit(model, tokenizer) == length_limit(model, tokenizer, unlimited) == own["max_length"] == 64
    assert length_limit(model, tokenizer, 5) == 5
    latents = encode_texts(model, tokenizer, texts, **given)
    assert torch.equal(latents.num_vectors, encode_texts(model, TOKENIZER, texts).num_vectors)
    assert reconstruct(model, tokenizer, texts, **given) == reconstruct(model, TOKENIZER, texts, **own)
    assert decode_latents(model, tokenizer, latents, **given) == decode_latents(model, TOKENIZER, latents, **own)
    assert as_read(tokenizer, texts) == as_read(tokenizer, texts, unlimited) == as_read(TOKENIZER, texts)
    for measure in (module.kept_tokens, rate_distortion):
        assert measure(model, tokenizer, texts, **given) == measure(model, TOKENIZER, texts, **own)
    fewer = {"num_samples": 0, "num_pairs": 0, "importance_samples": 0}
    results = [evaluate(model, tokenizer, texts, **some, **fewer) for some in (given, own)]
    assert results[0] == results[1] and results[0]["settings"]["max_length"] == 64


def test_texts_as_long_as_the_limit_are_read_and_written():
    model = tiny_nvib(base={"max_position_embeddings": 12})
    with torch.no_grad():
        model.base.final_logits_bias[0, EOS] = -1e4  # no text ends by itself
    (long,) = (" ".join(f"w{i}" for i in range(10, 40)),)
    assert encode_texts(model, TOKENIZER, [long]).num_vectors.tolist() == [12]
    assert len(reconstruct(model, TOKENIZER, [long])[0].split()) == 12
    assert encode_texts(model, TOKENIZER, [long], max_length=5).num_vectors.tolist() == [5]
    assert len(reconstruct(model, TOKENIZER, [long], max_length=5)[0].split()) == 5
    assert len(decode_latents(model, TOKENIZER, model.sample_latents(1, 4), max_length=3)[0].split()) == 3


def test_the_target_of_an_empty_text_is_its_end():
    """Also if the decoder starts with the end, as BART's does by default."""
    for start in (0, 1, EOS):
        model = tiny_nvib("bart")
        model.config.base_config.decoder_start_token_id = start
        labels = labels_of(model, TOKENIZER, ["w5 w6", ""], 12)
        assert labels[1].tolist()[0] == EOS and (labels[1, 1:] == -100).all()
        assert (labels[0] == EOS).sum() == 1


@pytest.mark.parametrize("size", [0, -1, 1.5])
@pytest.mark.parametrize("function", [encode_texts, reconstruct, decode_latents])
def test_sizes_of_batches_are_checked(function, size):
    given = tiny_nvib().sample_latents(2, num_vectors=3) if function is decode_latents else TEXTS
    with pytest.raises(ValueError, match=f"batch_size must be a whole number of at least 1, but got {size}"):
        function(tiny_nvib(), TOKENIZER, given, batch_size=size)


@pytest.mark.parametrize("more", [{"num_return_sequences": 2, "num_beams": 2}, {"return_dict_in_generate": True}])
def test_more_than_one_text_for_each_is_refused(more):
    model, name = tiny_nvib(), next(iter(more))
    for call in (
        lambda: reconstruct(model, TOKENIZER, TEXTS, **more),
        lambda: decode_latents(model, TOKENIZER, model.sample_latents(2, num_vectors=3), **more),
    ):
        with pytest.raises(ValueError, match=f"{name}=.* does not give one text for each"):
            call()


def test_as_read_cuts_where_the_tokenizer_does():
    short = tiny_tokenizer()
    short.model_max_length = 4
    assert as_read(short, ["w5 w6 w7 w8 w9"]) == ["w5 w6 w7"]
    assert as_read(TOKENIZER, ["w5 w6 w7 w8 w9"]) == ["w5 w6 w7 w8 w9"]


# --------------------------------------------------------------------------------------------------- as documented
@pytest.mark.parametrize("name", ["encode_texts", "decode_latents", "reconstruct"])
def test_the_example_runs_with_public_names(name):
    assert name in nvib_hf.__all__
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(nvib_hf, name), name, module=module, globs={})
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0
