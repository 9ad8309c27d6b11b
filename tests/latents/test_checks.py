"""Latents are looked at where a model takes them: what is not a distribution of its own kind is refused by name."""

import copy
import dataclasses
import re

import pytest
import torch
from safetensors import safe_open
from tiny_latents import INF, mixture, sample
from tiny_models import tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib

from nvib_hf import NvibLatents, concatenate_latents

NAN = float("nan")


def says(*parts):
    return "(?s)" + ".*".join(re.escape(part) for part in parts)


@pytest.fixture(scope="module")
def model():
    return tiny_nvib()


@pytest.fixture
def latents(model):
    return model.encode(**tiny_inputs("bart"))


def doors(model):
    """Every way in."""
    return {
        "generate": lambda x: model.generate(encoder_outputs=x, max_new_tokens=2),
        "forward": lambda x: model(encoder_outputs=x, labels=tiny_labels("bart")),
        "interpolate": lambda x: model.interpolate_latents(x, x, 0.5, method="mixture"),
        "vary": model.vary_latents,
        "blend": lambda x: model.blend_latents(x, 2),
    }


def with_value(name, value, at=(1, 0)):
    """A change of one entry."""

    def change(latents):
        changed = getattr(latents, name).clone()
        changed[at] = value
        return dataclasses.replace(latents, **{name: changed})

    return change


WRONG = {
    "nan in z": (with_value("z", NAN), "Latent 1 is not a distribution: its vectors hold NaN"),
    "infinite z": (with_value("z", INF), "Latent 1 is not a distribution: its vectors hold NaN or infinity"),
    "nan in logvar": (with_value("logvar", NAN), "Latent 1 is not a distribution: its vectors"),
    "infinite variance": (with_value("logvar", INF), "Latent 1 is not a distribution: its vectors"),
    "nan in log_pi": (with_value("log_pi", NAN), "Latent 1 is not a distribution: log_pi holds NaN or infinity"),
    "all -inf": (
        with_value("log_pi", -INF, at=(2,)),
        "Latent 2 is not a distribution: log_pi is -inf for every vector",
    ),
    "all nan": (with_value("log_pi", NAN, at=(2,)), "Latent 2 is not a distribution: log_pi holds NaN"),
    "pi for log_pi": (
        lambda x: dataclasses.replace(x, log_pi=x.log_pi.exp()),
        "not to 1; log_pi holds logarithms, and log_pi.log_softmax(-1) makes the weights sum to 1",
    ),
    "not one": (lambda x: dataclasses.replace(x, log_pi=x.log_pi - 1), "its weights sum to 0.3679, not to 1"),
    "no tensor": (
        lambda x: dataclasses.replace(x, log_pi=None),
        "log_pi of the latents must be a tensor, but got None",
    ),
    "a list": (lambda x: dataclasses.replace(x, z=[1.0]), "z of the latents must be a tensor, but got [1.0]"),
    "whole numbers": (
        lambda x: dataclasses.replace(x, z=x.z.long()),
        "z of the latents must be floating, but got torch.int64",
    ),
    "a mask of numbers": (
        lambda x: dataclasses.replace(x, attention_mask=x.attention_mask.long()),
        "attention_mask of the latents must be boolean, but got torch.int64",
    ),
    "a short mask": (
        lambda x: dataclasses.replace(x, attention_mask=x.attention_mask[:, 1:]),
        "fields do not fit together",
    ),
    "a number too few": (lambda x: dataclasses.replace(x, kl_gaussian=x.kl_gaussian[1:]), "do not fit together"),
    "another scale": (
        lambda x: dataclasses.replace(x, scale=2 * x.scale),
        "The latents were made for attention of scale=[0.7",
    ),
}


@pytest.mark.parametrize("door", ["generate", "forward", "interpolate", "vary", "blend"])
@pytest.mark.parametrize("change, message", WRONG.values(), ids=WRONG)
def test_what_is_no_distribution_of_this_model_is_refused(model, latents, change, message, door):
    if door == "blend":
        pytest.importorskip("ot")
    wrong = change(latents)
    before = copy.deepcopy(wrong)
    with pytest.raises((TypeError, ValueError), match=says(message)):
        doors(model)[door](wrong)
    for name, value in before.items():
        kept = getattr(wrong, name)
        assert kept == value if isinstance(value, list) else torch.equal(kept.nan_to_num(7), value.nan_to_num(7))


@pytest.mark.parametrize("door", ["generate", "forward", "interpolate", "vary", "blend"])
def test_what_a_model_makes_is_not(model, latents, door):
    if door == "blend":
        pytest.importorskip("ot")
    doors(model)[door](latents)


def test_everything_that_comes_out_of_a_model_goes_into_it(model, latents):
    """Draws, samples, parts, batches, blends and what stands between."""
    pytest.importorskip("ot")
    drawn = model.sample_latents(3, [2, 5, 3])
    made = {
        "a draw": model.encode(**tiny_inputs("bart"), sample=True),
        "a sample": drawn,
        "compact": latents.compact(),
        "one": latents[1],
        "together": concatenate_latents([latents, drawn]),
        "between": model.interpolate_latents(latents, drawn, 0.3),
        "side by side": model.interpolate_latents(latents, drawn, 0.3, method="mixture"),
        "varied": model.vary_latents(latents, redraw_weights=True),
        "blended": model.blend_latents(latents, 2),
        "in half precision": latents.to(dtype=torch.bfloat16).to(dtype=torch.float32),
    }
    for name, value in made.items():
        assert torch.allclose(value.scale, torch.tensor(model.scale)), name
        assert len(model.generate(encoder_outputs=value, max_new_tokens=2)) == len(value)


@pytest.mark.parametrize("dropping", [{"alpha_threshold": 0.5}, {"dropping": "relaxed"}, {"kappa": 3}])
def test_what_is_dropped_or_drawn_sums_to_one_too(dropping):
    model = tiny_nvib(**dropping)
    for sampled in (False, True):
        model.generate(encoder_outputs=model.encode(**tiny_inputs("bart"), sample=sampled), max_new_tokens=2)


def test_nothing_is_lost_under_autograd(model, latents):
    """A NaN whose loss is finite is refused all the same, and gradients reach what is right."""
    wrong = with_value("log_pi", NAN)(latents)
    with pytest.raises(ValueError, match="Latent 1 is not a distribution"):
        model(encoder_outputs=wrong, labels=tiny_labels("bart"))
    latents.z.requires_grad_()
    model(encoder_outputs=latents, labels=tiny_labels("bart")).loss.backward()
    assert latents.z.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------------ another model
def test_a_file_says_of_which_width_and_scale_its_latents_are(model, latents, tmp_path):
    path = tmp_path / "latents.safetensors"
    latents.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["width"] == "32" and float(metadata["scale"]) == pytest.approx(model.scale)
    loaded = NvibLatents.load(path)
    assert torch.equal(loaded.scale, latents.scale)
    other = tiny_nvib(base={"encoder_attention_heads": 2, "decoder_attention_heads": 2})  # of the same width
    assert other.nvib.size_out == model.nvib.size_out
    for call in doors(other).values():
        with pytest.raises(ValueError, match=says("made for attention of scale=[0.35", "this model has scale=0.25")):
            call(loaded)


def test_latents_of_different_models_make_no_batch(model, latents):
    pytest.importorskip("ot")
    other = tiny_nvib(base={"encoder_attention_heads": 2, "decoder_attention_heads": 2}).encode(**tiny_inputs("bart"))
    with pytest.raises(ValueError, match=says("scales [0.25, 0.35", "different models")):
        concatenate_latents([latents, other])
    unknown = dataclasses.replace(other, scale=None)
    assert concatenate_latents([latents, unknown]).scale is None


def test_latents_by_hand_have_no_scale_and_are_taken(model):
    z = torch.randn(2, 3, 32)
    by_hand = NvibLatents(z=z, log_pi=torch.zeros(2, 3).log_softmax(-1), attention_mask=torch.ones(2, 3).bool())
    assert len(model.generate(encoder_outputs=by_hand, max_new_tokens=2)) == 2


# ------------------------------------------------------------------------------------------------------- arguments
def test_latents_need_their_three_fields():
    with pytest.raises(TypeError, match=r"z.*log_pi.*attention_mask"):
        NvibLatents()


def test_latents_are_no_index():
    with pytest.raises(TypeError, match=r"The index of latents must be a number.* but got latents"):
        mixture()[mixture()]


@pytest.mark.parametrize("temperature", ["0.5", None, torch.ones(2), [1.0], True])
def test_temperatures_are_numbers(model, latents, temperature):
    with pytest.raises(TypeError, match="temperature must be a number, but got"):
        model.vary_latents(latents, temperature=temperature)
    assert torch.equal(model.vary_latents(latents, temperature=torch.tensor(0.0)).z, model.vary_latents(latents, 0).z)


@pytest.mark.parametrize("weight", ["0.5", None, True])
@pytest.mark.parametrize("method", ["transport", "mixture"])
def test_weights_are_numbers(model, latents, weight, method):
    if method == "transport":
        pytest.importorskip("ot")
    with pytest.raises(TypeError, match="weight must be a number, but got"):
        model.interpolate_latents(latents, latents, weight, method=method)


COUNTS = [
    (2.0, 3),
    ("2", 3),
    (True, 3),
    (10**30, 3),
    (2, "5"),
    (2, 10**30),
    (2, [3, 10**30]),
    (2, [3, "a"]),
]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_numbers_of_samples_and_vectors_are_whole(model, counts):
    with pytest.raises(ValueError, match=r"num_samples must be a whole number|num_vectors must be whole numbers"):
        model.sample_latents(*counts)


def test_numbers_of_blends_are_whole(model, latents):
    for arguments in ((2.0,), (2, 2.5), ("2",)):
        with pytest.raises(ValueError, match="must be a whole number of at least"):
            model.blend_latents(latents, *arguments)


def test_a_sample_without_a_model_still_concatenates():
    assert concatenate_latents([mixture(), sample()]).scale is None
