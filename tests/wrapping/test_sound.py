"""Whisper over the sound alone: what is cut is what silence makes of it, and nothing else changes."""

import pytest
import torch
from tiny_models import VOCAB_SIZE, checkpoint_layers, decoder_inputs, tiny_base
from tiny_nvib import generate
from tiny_sound import FRAMES, LENGTHS, TIMESTAMPS, WINDOW, features, mask_of, whisper_base, wrapped

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


@pytest.fixture(scope="module")
def base():
    return whisper_base()


@pytest.fixture(scope="module")
def model(base):
    return wrapped(base)


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
    """In place of the zeros that Whisper fills it up with."""
    x, silence = features().masked_fill(mask_of(LENGTHS)[:, None] == 0, 0), torch.tensor([-0.3, -0.4, -0.5])
    marked = mark_end(x, torch.tensor(LENGTHS), torch.tensor(LENGTHS), silence)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(marked[row, :, :length], x[row, :, :length])
        assert (marked[row, :, length : length + 2 * MARGIN] == silence[row]).all()
        assert marked[row, :, length + 2 * MARGIN :].isnan().all()
    more = torch.tensor(LENGTHS) + 3  # of the input
    marked = mark_end(features(), torch.tensor(LENGTHS), more, silence)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(marked[row, :, : length + 3], features()[row, :, : length + 3])
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


@torch.no_grad()
def test_with_timestamps_the_loop_ends_where_the_sound_does(base, model, monkeypatch):
    """Whisper's own goes on until the end of the window, and writes texts into its silence."""
    ends, view = [], type(model.as_whisper())
    whole = view._retrieve_segment
    monkeypatch.setattr(view, "_retrieve_segment", lambda *a, **k: ends.append(k["seek_num_frames"]) or whole(*a, **k))
    lengths = [20, 40, 90]
    found = model.generate(
        features(), attention_mask=mask_of(lengths), return_timestamps=True, return_segments=True, language="en"
    )
    assert ends[0].tolist() == lengths
    for segments, length in zip(found["segments"], lengths, strict=True):
        assert segments and all(segment["start"] < length / 100 for segment in segments)


def test_a_segment_after_the_end_of_the_sound_is_left_out(base, model):
    """What the decoder writes again, with times at which nothing is heard."""
    first = VOCAB_SIZE  # of the timestamps, 0.02 s each
    written = torch.tensor([first, 5, 6, first + 20, first + 25, 7, first + 40])  # 0 to 0.4 s, 0.5 to 0.8 s
    given = {
        "seek_sequence": written,
        "seek_outputs": [{}],
        "time_offset": torch.tensor([1.0]),
        "timestamp_begin": first,
        "time_precision": 0.02,
        "time_precision_features": 0.01,
        "input_stride": 2,
        "prev_idx": 0,
        "idx": 0,
        "return_token_timestamps": False,
        "decoder_input_ids": torch.tensor([[1]]),
    }
    for frames, expected in ((40, 1), (60, 2)):
        segments, _ = model.as_whisper()._retrieve_segment(**given, seek_num_frames=torch.tensor([frames]))
        everything, _ = base._retrieve_segment(**given, seek_num_frames=torch.tensor([frames]))
        assert (len(segments), len(everything)) == (expected, 2)
        assert segments[0]["tokens"].tolist() == [first, 5, 6, first + 20]


# ------------------------------------------------------------------------------------ without a mask, or a wrong one
@pytest.fixture
def warnings_said(monkeypatch):
    said = []
    monkeypatch.setattr("nvib_hf.wrapping.sound.logger.warning_once", said.append)
    return said


@torch.no_grad()
def test_sound_of_unknown_length_is_warned_of(model, warnings_said):
    x, tokens = features(), decoder_inputs()
    for call in (
        lambda: model.encode(input_features=x),
        lambda: model(input_features=x, decoder_input_ids=tokens),
        lambda: model.generate(x),
        lambda: model.generate(input_features=x, decoder_input_ids=tokens, max_new_tokens=2),
    ):
        call()
        assert len(warnings_said) == 1 and "return_attention_mask=True" in warnings_said.pop()


@torch.no_grad()
def test_sound_of_known_length_is_not_warned_of(base, model, warnings_said):
    x, long, tokens = features(), features(300, batch=2), decoder_inputs()
    for mask in (mask_of([FRAMES] * 3), mask_of(LENGTHS)):
        model.encode(input_features=x, attention_mask=mask)
        model(input_features=x, attention_mask=mask, decoder_input_ids=tokens)
        model.generate(x, attention_mask=mask)  # and detects the languages
        model.as_whisper()(input_features=x, attention_mask=mask, decoder_input_ids=tokens)
    model.generate(long, attention_mask=mask_of([300, 170], 300), return_timestamps=True)
    model.generate(long[:1], return_timestamps=True)  # it ends where it ends
    model.encode(input_features=mark_unheard(x, torch.tensor(LENGTHS)))
    model.generate(encoder_outputs=model.encode(input_features=x, attention_mask=mask))
    wrapped(base, encode_sound_only=False).encode(input_features=x)
    assert not warnings_said


@torch.no_grad()
def test_a_mask_of_another_length_is_refused(model):
    for call in (model.encode, model.generate):
        with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 64\), .* \(3, 8, 128\) need \(3, 128\)"):
            call(input_features=features(), attention_mask=mask_of([40, 20, 61], 64))


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


@torch.no_grad()
def test_noise_in_the_encoders_own_attention(base):
    """With NVIB in the encoder's self-attention, which reads the mask too."""
    model = wrapped(base, attentions=["cross", "encoder"])
    x, mask, tokens = features(), mask_of(LENGTHS), decoder_inputs()
    together = model(input_features=x, attention_mask=mask, decoder_input_ids=tokens).logits
    plain = wrapped(base)(input_features=x, attention_mask=mask, decoder_input_ids=tokens).logits
    torch.testing.assert_close(together, plain, atol=1e-3, rtol=0)
