"""Whisper over the sound alone, with an encoder whose layers merge: all masses together are the window's."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, decoder_inputs, tiny_base
from tiny_sound import FRAMES, LENGTHS, TIMESTAMPS, WINDOW, features, mask_of, whisper_base, wrapped

from nvib_hf.wrapping import sound
from nvib_hf.wrapping.sound import MARGIN, STORED, stored_silence

BOTH = {"attentions": ["cross", "encoder"]}


@pytest.fixture(scope="module")
def base():
    return whisper_base()


def masses(model, latents, row: int) -> torch.Tensor:
    """Of the vectors that a row's decoder reads. The stored ones, which are last, have the mass of the rest."""
    bias = latents.attended(model.scale, "means").bias[row, 1:]
    bias = bias[latents.log_pi[row, 1:] > -float("inf")].double()
    number = -(-LENGTHS[row] // 2) + MARGIN
    return (bias - bias[-1]).exp() * (WINDOW - number) / STORED


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"accumulate_alpha": True}], ids=str)
def test_a_share_of_1_in_the_encoder_changes_nothing(base, more):
    plain, merging = wrapped(base, **BOTH, **more), wrapped(base, **BOTH, **more, encoder_merge_share={0: 1.0, 1: 1.0})
    x, mask, tokens = features(), mask_of(LENGTHS), decoder_inputs()
    torch.testing.assert_close(merging.silence, plain.silence, atol=1e-5, rtol=1e-5)
    for given in (mask, mask_of([FRAMES] * 3), mask_of([FRAMES, 40, 40])):
        outputs = [m(input_features=x, attention_mask=given, decoder_input_ids=tokens) for m in (plain, merging)]
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-4, rtol=1e-4)
        for name in ("num_vectors", "prop_vectors"):
            torch.testing.assert_close(outputs[0][name], outputs[1][name])


@torch.no_grad()
def test_merged_in_the_encoder_the_window_keeps_its_mass(base):
    model = wrapped(base, **BOTH, encoder_merge_share={0: 0.5, 1: 0.5})
    x, mask = features(), mask_of(LENGTHS)
    latents = model.encode(input_features=x, attention_mask=mask)
    for row, length in enumerate(LENGTHS):
        number = -(-length // 2) + MARGIN
        left = round(round(number / 2) / 2)
        assert latents.num_vectors[row] == left + STORED
        torch.testing.assert_close(latents.prop_vectors[row], latents.num_vectors[row] / WINDOW)
        of_row = masses(model, latents, row)
        assert of_row.sum().item() == pytest.approx(WINDOW, rel=1e-3)
        counts = of_row[:-STORED]
        torch.testing.assert_close(counts, counts.round(), atol=0.05, rtol=0)
        assert counts.round().sum() == number and counts.max() > 1.5
        seen = latents.z[row, 1:][latents.log_pi[row, 1:] > -float("inf")]
        torch.testing.assert_close(seen[-STORED:], model.silence)
    again = model.encode(input_features=x, attention_mask=mask, merge_share=0.5)
    assert torch.equal(again.num_vectors, ((latents.num_vectors - STORED) * 0.5).round() + STORED)
    for row in range(3):
        assert masses(model, again, row).sum().item() == pytest.approx(WINDOW, rel=1e-3)


@torch.no_grad()
def test_the_cut_encoder_merges_as_one_with_a_shorter_window(base):
    """Another model of the same weights, with a window as long as the sound and its margin, and without a mask."""
    settings = {**BOTH, "encoder_merge_share": {0: 0.5}}
    length, number = 40, 20 + MARGIN
    state, name = base.state_dict(), "model.encoder.embed_positions.weight"
    shorter = tiny_base("whisper", max_source_positions=number, vocab_size=VOCAB_SIZE + TIMESTAMPS)
    shorter.load_state_dict({**state, name: state[name][:number]})
    shorter = wrapped(shorter, **settings, encode_sound_only=False)
    tokens = decoder_inputs(batch=1)
    expected = shorter(input_features=features()[:1, :, : 2 * number], decoder_input_ids=tokens)
    model = wrapped(base, **settings)
    mask = mask_of([length])
    found = model(input_features=features()[:1], attention_mask=mask, decoder_input_ids=tokens)
    assert expected.encoder_last_hidden_state.shape[1] == round(number / 2)
    torch.testing.assert_close(found.encoder_last_hidden_state, expected.encoder_last_hidden_state)
    torch.testing.assert_close(found.layer_prop_vectors["encoder.1"], expected.layer_prop_vectors["encoder.1"])


@torch.no_grad()
def test_rows_merged_in_the_encoder_are_merged_by_themselves(base):
    model = wrapped(base, **BOTH, encoder_merge_share={0: 0.5})
    x, tokens = features(), decoder_inputs()
    for lengths in (LENGTHS, [FRAMES, *LENGTHS[1:]]):
        mask = mask_of(lengths)
        together = model(input_features=x, attention_mask=mask, decoder_input_ids=tokens)
        written = model.generate(x, attention_mask=mask, language="en")
        for row in range(3):
            of_row = {"input_features": x[[row]], "attention_mask": mask[[row]]}
            alone = model(**of_row, decoder_input_ids=tokens[[row]])
            torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=0)
            assert together.num_vectors[row] == alone.num_vectors[0]
            tokens_alone = model.generate(**of_row, language="en")
            assert torch.equal(written[row, : tokens_alone.shape[1]], tokens_alone[0])


@torch.no_grad()
def test_merged_silence_is_what_each_place_of_the_window_became(base):
    """Pieces are of equal time, although some merged vectors are of many places."""
    model = wrapped(base, **BOTH, encoder_merge_share={0: 0.5})
    silence = model.base.get_encoder()(torch.full((1, 8, FRAMES), sound.BESIDE_SPEECH)).last_hidden_state[0]
    assert len(silence) == WINDOW // 2
    states = stored_silence(model.base, WINDOW)  # pieces of one place
    assert len(states) == WINDOW
    runs = torch.unique_consecutive(states, dim=0)
    torch.testing.assert_close(runs, torch.unique_consecutive(silence, dim=0))
    torch.testing.assert_close(model.silence, torch.stack([piece.mean(0) for piece in states.tensor_split(STORED)]))


def test_training_reaches_an_encoder_that_merges(base):
    tokens = decoder_inputs()
    model = wrapped(base, **BOTH, encoder_merge_share={0: 0.5}).train()
    output = model(input_features=features(), attention_mask=mask_of(LENGTHS), labels=tokens)
    output.loss.backward()
    assert output.num_vectors.tolist() == [round((-(-x // 2) + MARGIN) / 2) + STORED for x in LENGTHS]
    for layer in model.base.get_encoder().layers:
        assert layer.fc1.weight.grad.isfinite().all() and layer.fc1.weight.grad.abs().max() > 0
