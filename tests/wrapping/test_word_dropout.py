"""Word dropout: how much, where, and only in training."""

import pytest
import torch
from tiny_models import tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib

from nvib_hf.wrapping.base import drop_words


def test_share_and_place():
    ids = torch.randint(5, 90, (200, 50))
    before = ids.clone()
    dropped = drop_words(ids, 0.3, 1, torch.Generator().manual_seed(0))
    assert torch.equal(ids, before)  # a copy
    assert torch.equal(dropped[:, 0], ids[:, 0])
    changed = dropped != ids
    assert (dropped[changed] == 1).all()
    assert changed[:, 1:].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(dropped, drop_words(ids, 0.3, 1, torch.Generator().manual_seed(0)))


@pytest.fixture
def inputs_seen(monkeypatch):
    """What the decoder of a model reads."""

    def run(model, **inputs):
        seen = []
        handle = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        model(**inputs)
        handle.remove()
        return seen[0]

    return run


@pytest.mark.parametrize("given", [False, True], ids=["from labels", "given"])
def test_the_decoder_reads_fewer_words_in_training_alone(given, inputs_seen):
    model = tiny_nvib("bart", word_dropout=0.9, word_dropout_token_id=9)
    inputs, labels = tiny_inputs("bart"), tiny_labels("bart")
    expected = model.prepare_decoder_input_ids_from_labels(labels)
    if given:
        inputs["decoder_input_ids"] = expected
    assert torch.equal(inputs_seen(model.eval(), **inputs, labels=labels), expected)
    torch.manual_seed(0)
    seen = inputs_seen(model.train(), **inputs, labels=labels)
    assert (seen[:, 1:] == 9).float().mean() > 0.6
    assert torch.equal(seen[:, 0], expected[:, 0])


def test_the_padding_token_by_default(inputs_seen):
    model = tiny_nvib("t5", word_dropout=0.9).train()
    seen = inputs_seen(model, **tiny_inputs("t5"), labels=tiny_labels("t5"))
    assert (seen[:, 1:] == model.config.pad_token_id).float().mean() > 0.6


def test_a_model_without_a_padding_token_needs_one():
    model, labels = tiny_nvib("bart", word_dropout=0.5).train(), tiny_labels("bart")
    decoder_input_ids = model.prepare_decoder_input_ids_from_labels(labels)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="word_dropout_token_id"):
        model(**tiny_inputs("bart"), decoder_input_ids=decoder_input_ids, labels=labels)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_refuses_a_share_outside_its_range(share):
    with pytest.raises(ValueError, match=f"word_dropout must be in .* but got {share}"):
        tiny_nvib("bart", word_dropout=share)
