"""Whisper over the sound alone: what is cut is what silence makes of it, and nothing else changes."""

import copy

import pytest
import torch
from tiny_models import VOCAB_SIZE, checkpoint_layers, decoder_inputs, tiny_base
from tiny_nvib import generate
from transformers import GenerationConfig

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.wrapping import sound, source
from nvib_hf.wrapping.sound import (
    MARGIN,
    STORED,
    cut_encoder,
    hear,
    heard_frames,
    mark_end,
    mark_unheard,
    stored_silence,
)

WINDOW, FRAMES = 64, 128  # vectors, and the frames they are made of
TIMESTAMPS = WINDOW + 1
PROMPTS = {
    "is_multilingual": True,
    "lang_to_id": {"<|en|>": 30, "<|fr|>": 31, "<|de|>": 32},
    "task_to_id": {"transcribe": 33, "translate": 34},
    "prev_sot_token_id": 35,
    "no_timestamps_token_id": VOCAB_SIZE - 1,
    "max_initial_timestamp_index": 10,
    "max_length": 14,
    "return_timestamps": False,
}


@pytest.fixture(scope="module")
def base():
    base = tiny_base("whisper", max_source_positions=WINDOW, vocab_size=VOCAB_SIZE + TIMESTAMPS)
    settings = {**base.generation_config.to_dict(), **PROMPTS, "_from_model_config": False}
    base.generation_config = GenerationConfig(**settings)
    return base.eval()


@pytest.fixture(scope="module")
def model(base):
    return wrapped(base)


def wrapped(base, **settings) -> NvibForConditionalGeneration:
    settings = {"encode_sound_only": True, **settings}
    return NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base), **settings).eval()


def features(frames: int = FRAMES, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 8, frames, generator=torch.Generator().manual_seed(3))


def mask_of(lengths: list[int], frames: int = FRAMES) -> torch.Tensor:
    return (torch.arange(frames) < torch.tensor(lengths)[:, None]).long()


LENGTHS = [40, 20, 61]


# ------------------------------------------------------------------------------------ the encoder, cut
def test_a_fresh_wrap_is_its_base_unless_asked(base):
    model = wrapped(base, encode_sound_only=False)
    assert not hasattr(model, "silence") and "silence" not in model.state_dict()
    sound, mask = features(), mask_of(LENGTHS)
    assert torch.equal(model.generate(sound, attention_mask=mask, language="en"), base.generate(sound, language="en"))


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"language": "fr"}, {"num_beams": 3, "language": ["en", "de", "fr"]}], ids=str
)
@pytest.mark.parametrize(
    "mask", [None, mask_of([FRAMES] * 3), mask_of([FRAMES - 2 * MARGIN] * 3)], ids=["no", "full", "margin"]
)
def test_all_sound_is_the_plain_path(base, model, mask, settings):
    sound = features()
    assert torch.equal(model.generate(sound, attention_mask=mask, **settings), base.generate(sound, **settings))


@torch.no_grad()
def test_the_cut_encoder_is_whisper_with_a_shorter_window(base):
    """Another model of the same weights, as Transformers itself makes it for a shorter window."""
    number = 37
    state = base.state_dict()
    name = "model.encoder.embed_positions.weight"
    shorter = tiny_base("whisper", max_source_positions=number, vocab_size=VOCAB_SIZE + TIMESTAMPS)
    shorter.load_state_dict({**state, name: state[name][:number]})
    expected = shorter.get_encoder()(features()[:, :, : 2 * number], output_hidden_states=True)
    found = cut_encoder(base.get_encoder(), number, None)(features()[:, :, : 2 * number], output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    assert base.get_encoder().embed_positions.num_embeddings == WINDOW
    assert base.config.max_source_positions == WINDOW


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_do_not_see_each_other(base, implementation):
    model = wrapped(base)
    model.set_attn_implementation(implementation)
    sound, mask, tokens = features(), mask_of(LENGTHS), decoder_inputs()
    together = model(input_features=sound, attention_mask=mask, decoder_input_ids=tokens)
    for row, length in enumerate(LENGTHS):
        alone = model(input_features=sound[[row]], attention_mask=mask[[row]], decoder_input_ids=tokens[[row]])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=0)
        assert together.num_vectors[row] == -(-length // 2) + MARGIN + STORED == alone.num_vectors[0]
        torch.testing.assert_close(together.prop_vectors[row], together.num_vectors[row] / WINDOW)


@torch.no_grad()
def test_what_comes_after_the_margin_changes_nothing(model):
    sound, mask = features(), mask_of(LENGTHS)
    other = sound.clone()
    for row, length in enumerate(LENGTHS):
        other[row, :, 2 * (-(-length // 2) + MARGIN) :] = 7.0
    assert not torch.equal(other, sound)
    settings = {"language": "en", "return_timestamps": True}
    expected = model.generate(sound, attention_mask=mask, **settings)
    assert torch.equal(model.generate(other, attention_mask=mask, **settings), expected)
    latents = [model.encode(input_features=x, attention_mask=mask) for x in (sound, other)]
    torch.testing.assert_close(latents[0].z, latents[1].z)
    assert not torch.equal(model.encode(input_features=-sound, attention_mask=mask).z, latents[0].z)


# ------------------------------------------------------------------------------------ silence and its mass
@torch.no_grad()
def test_silence_has_the_mass_of_what_is_left_out(model):
    """A fresh wrap reads every vector of the window with mass 1, and so all of the window has a mass of its length."""
    latents = model.encode(input_features=features(), attention_mask=mask_of(LENGTHS))
    bias = latents.attended(model.scale, "means").bias
    bias = bias - bias[:, 1:2]  # the first vector of sound
    for row, length in enumerate(LENGTHS):
        number = -(-length // 2) + MARGIN
        seen = bias[row, 1:][latents.log_pi[row, 1:] > -float("inf")].exp()
        expected = torch.cat([torch.ones(number), torch.full((STORED,), (WINDOW - number) / STORED)])
        torch.testing.assert_close(seen, expected, rtol=1e-3, atol=0)
        torch.testing.assert_close(latents.z[row, -STORED:], model.silence)


@torch.no_grad()
def test_silence_is_what_the_encoder_makes_of_no_sound(base, model):
    states = base.get_encoder()(torch.full((1, 8, FRAMES), sound.BESIDE_SPEECH)).last_hidden_state[0]
    torch.testing.assert_close(stored_silence(base, 2), torch.stack([states[:32].mean(0), states[32:].mean(0)]))
    torch.testing.assert_close(model.silence, stored_silence(base, STORED))


def test_the_mask_or_the_marks_say_how_much_is_heard():
    x, mask, after = features(), mask_of(LENGTHS), 2 * MARGIN
    heard = [length + after for length in LENGTHS]
    assert heard_frames(x, None).tolist() == [FRAMES] * 3
    assert heard_frames(x, mask).tolist() == heard
    assert heard_frames(mark_unheard(x, torch.tensor(heard)), None).tolist() == heard
    mask[0, 3] = 0  # a pause
    assert heard_frames(x, mask).tolist() == heard
    assert heard_frames(x, torch.zeros_like(mask)).tolist() == [after] * 3
    assert heard_frames(x, mask_of([FRAMES, FRAMES - 1, 1])).tolist() == [FRAMES, FRAMES, after + 1]


def test_the_end_of_long_sound_is_silence():
    """In place of the zeros that Whisper fills it up with, which are no floor of anything."""
    x = features().masked_fill(mask_of(LENGTHS)[:, None] == 0, 0)
    marked = mark_end(x, torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        assert torch.equal(marked[row, :, :length], x[row, :, :length])
        assert (marked[row, :, length : length + 2 * MARGIN] == x[row, :, :length].min()).all()
        assert marked[row, :, length + 2 * MARGIN :].isnan().all()


@torch.no_grad()
def test_nothing_at_all_is_heard(model):
    latents = model.encode(input_features=torch.full((1, 8, FRAMES), float("nan")))
    assert latents.z.isfinite().all() and latents.num_vectors.tolist() == [MARGIN + STORED]


# ------------------------------------------------------------------------------------ generate()
@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"language": ["en", "de", "fr"]},
        {"return_timestamps": True, "language": "en"},
        {"num_beams": 3, "language": "en"},
        {"merge_share": 0.25, "language": "en"},
        {"prompt_ids": torch.tensor([35, 7, 9]), "language": "fr"},
    ],
    ids=lambda settings: "-".join(settings) or "detection",
)
def test_rows_are_written_by_themselves(model, settings):
    x, mask = features(), mask_of(LENGTHS)
    together = model.generate(x, attention_mask=mask, **settings)
    for row in range(3):
        own = {name: value[row] if isinstance(value, list) else value for name, value in settings.items()}
        alone = model.generate(x[[row]], attention_mask=mask[[row]], **own)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


@torch.no_grad()
def test_generation_reads_what_encode_makes(model):
    x, mask = features(), mask_of(LENGTHS)
    written = model.generate(x, attention_mask=mask, language="en")
    encoded = model.generate(encoder_outputs=model.encode(input_features=x, attention_mask=mask), language="en")
    assert torch.equal(encoded[:, 4 : 4 + written.shape[1]], written)
    assert not torch.equal(model.generate(x, language="en"), written)
    plain = generate(model, {"input_features": x, "attention_mask": mask, "decoder_input_ids": encoded[:, :4]})
    length = min(plain.shape[1], encoded.shape[1])
    assert torch.equal(plain[:, :length], encoded[:, :length])


@torch.no_grad()
def test_other_temperatures_keep_the_rows_apart(model):
    """Whisper's loop goes on with some of the rows, and hands on the mask of all."""
    x, mask = features(), mask_of(LENGTHS)
    settings = {"language": "en", "temperature": (0.0, 1e-4), "logprob_threshold": -1e-3}  # all again, greedily
    expected = model.generate(x, attention_mask=mask, language="en")
    assert torch.equal(model.generate(x, attention_mask=mask, **settings), expected)


@torch.no_grad()
def test_long_sound_is_cut_into_windows(model, monkeypatch):
    long, mask = features(300, batch=2), mask_of([300, 170], 300)
    settings = {"return_timestamps": True, "return_segments": True, "language": "en"}
    found = model.generate(long, attention_mask=mask, **settings)
    assert len(found["segments"][0]) > 1
    seen = []
    monkeypatch.setattr(
        source, "hear", lambda *given: seen.append(heard_frames(given[1]["input_features"], None)) or hear(*given)
    )
    again = model.generate(long, attention_mask=mask, **settings)
    assert torch.equal(again["sequences"], found["sequences"])
    assert seen[0].tolist() == [FRAMES, FRAMES]
    assert seen[-1].min() < FRAMES  # the last window is not all sound
    # Its end is filled up with zeros by Whisper, and after the margin nothing of that is read.
    alone = model.generate(long[:1], attention_mask=mask[:1], **settings)
    assert torch.equal(found["sequences"][0, : alone["sequences"].shape[1]], alone["sequences"][0])


# ------------------------------------------------------------------------------------ merged, saved, trained, refused
@torch.no_grad()
def test_stored_silence_is_not_merged(model):
    x, mask = features(), mask_of(LENGTHS)
    full = model.encode(input_features=x, attention_mask=mask)
    made = model.encode(input_features=x, attention_mask=mask, merge_share=0.25)
    sound_alone = full.num_vectors - STORED
    assert torch.equal(made.num_vectors, (sound_alone * 0.25).round() + STORED)
    torch.testing.assert_close(made.prop_vectors, made.num_vectors / WINDOW)
    for row in range(3):
        number = int(made.num_vectors[row]) + 1
        torch.testing.assert_close(made.z[row, number - STORED : number], model.silence)
    mass = [x.attended(model.scale, "means").bias for x in (full, made)]
    torch.testing.assert_close(*[(x - x[:, :1]).logsumexp(-1) for x in mass])


@torch.no_grad()
def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert loaded.config.encode_sound_only and torch.equal(loaded.silence, model.silence)
    x, mask = features(), mask_of(LENGTHS)
    settings = {"attention_mask": mask, "language": "en", "num_beams": 2}
    assert torch.equal(loaded.generate(x, **settings), model.generate(x, **settings))


def test_stored_later(base, model):
    later = wrapped(base, encode_sound_only=False).store_silence()
    assert torch.equal(later.silence, model.silence) and later.config.encode_sound_only


@torch.no_grad()
def test_the_setting_alone_is_refused(base, tmp_path):
    """Set in the configuration of a model that stored no silence."""
    later = wrapped(base, encode_sound_only=False)
    later.config.encode_sound_only = True
    x, mask = features(), mask_of(LENGTHS)
    for call in (
        lambda: later.encode(input_features=x, attention_mask=mask),
        lambda: later(input_features=x, attention_mask=mask, labels=decoder_inputs()),
        lambda: later.generate(x, attention_mask=mask, language="en"),
        lambda: later.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"encode_sound_only was set .* Call model.store_silence\(\)"):
            call()
    assert not list(tmp_path.iterdir())
    assert later.store_silence().encode(input_features=x, attention_mask=mask).num_vectors.min() < WINDOW
    later.config.encode_sound_only = False
    assert later.encode(input_features=x, attention_mask=mask).num_vectors.tolist() == [WINDOW] * 3


def test_training_reaches_the_encoder(base):
    """With and without computing the layers again, which see the mask both times."""
    tokens, gradients = decoder_inputs(), []
    for again in (False, True):
        model = wrapped(base).train()
        if again:
            checkpoint_layers(model, {"use_reentrant": False})
        torch.manual_seed(0)
        x, mask = features(), mask_of(LENGTHS)
        model(input_features=x, attention_mask=mask, decoder_input_ids=tokens, labels=tokens).loss.backward()
        gradients.append(model.base.get_encoder().layers[0].fc1.weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


def test_others_are_refused(base):
    with pytest.raises(ValueError, match=r"encode_sound_only is for Whisper, .* but the encoder is a BartEncoder"):
        wrapped(tiny_base("bart"))
    with pytest.raises(ValueError, match="does not work with an encoder whose layers drop vectors"):
        wrapped(base, attentions=["cross", "encoder"], alpha_threshold=0.1)
    with pytest.raises(ValueError, match="128"):
        hear(base, {"input_features": features(100)}, torch.zeros(STORED, 32))


# ------------------------------------------------------------------------------------ merged inside the encoder
BOTH = {"attentions": ["cross", "encoder"]}


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


@torch.no_grad()
def test_noise_in_the_encoders_own_attention(base):
    """With NVIB in the encoder's self-attention, which reads the mask too."""
    model = wrapped(base, attentions=["cross", "encoder"])
    x, mask, tokens = features(), mask_of(LENGTHS), decoder_inputs()
    together = model(input_features=x, attention_mask=mask, decoder_input_ids=tokens).logits
    plain = wrapped(base)(input_features=x, attention_mask=mask, decoder_input_ids=tokens).logits
    torch.testing.assert_close(together, plain, atol=1e-3, rtol=0)
