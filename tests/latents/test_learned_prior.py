"""A model's learned prior: made by one call, kept with the model, drawn from, and asked what latents cost."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_latents import assert_same
from tiny_models import tiny_inputs
from tiny_nvib import tensors, tiny_nvib
from tiny_prior import SIZES, TRAINING, cycles, fit, seeded
from transformers import BertConfig, BertForSequenceClassification

from nvib_hf import NvibConfig, NvibForConditionalGeneration, NvibForSequenceClassification, NvibLatents


@pytest.fixture(scope="module")
def fitted() -> NvibForConditionalGeneration:
    model = tiny_nvib()
    fit(model)
    return model


# ------------------------------------------------------------------------------------------------------- the fit
def test_fit_learns_what_follows_and_leaves_the_rest_of_the_model():
    model = tiny_nvib()
    before = {name: value.clone() for name, value in tensors(model).items()}
    random = torch.get_rng_state()
    history = fit(model)
    assert torch.equal(torch.get_rng_state(), random)
    losses = [entry["held_out_loss"] for entry in history]
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] < 1.2 * torch.tensor(4.0).log() + 0.5  # one code is free, the others follow
    after = tensors(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name.partition(".")[0] for name in after.keys() - before.keys()} == {"latent_prior"}
    assert not any(p.requires_grad for p in model.latent_prior.parameters()) and not model.latent_prior.training
    assert model.config.latent_prior == {**SIZES, "max_length": 6}
    assert model.latent_prior.log_weight.item() == pytest.approx(-1.2, abs=1e-5)


def test_fit_depends_on_its_seed_alone():
    models = []
    for seed, state in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(state)
        models.append(tiny_nvib())
        fit(models[-1], seed=seed, max_steps=4, evaluate_every=2)
    first, again, other = (model.latent_prior.state_dict() for model in models)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert not torch.equal(first["code_bias"], other["code_bias"])


def test_a_second_fit_replaces_the_first_and_goes_on_from_a_checkpoint(tmp_path):
    model, settings = tiny_nvib(), {"max_steps": 4, "evaluate_every": 2}
    fit(model, **settings)
    once = model.latent_prior.state_dict()
    fit(model, **settings, sizes=None, checkpoint=tmp_path / "prior.pt")  # of the same sizes, which the model knows
    assert all(torch.equal(model.latent_prior.state_dict()[name], value) for name, value in once.items())
    again = tiny_nvib()
    assert len(fit(again, **settings, checkpoint=tmp_path / "prior.pt")) == 2
    assert all(torch.equal(again.latent_prior.state_dict()[name], value) for name, value in once.items())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda latents: dataclasses.replace(latents, z=1.05 * latents.z), "other latents. To start anew"),
        (lambda latents: latents[:-1], "latents: 300 where this one has 299"),
        ({"max_steps": 6}, "max_steps: 4 where this one has 6"),
        ({"seed": 1}, "seed: 0 where this one has 1"),
        ({"sizes": {**SIZES, "num_codes": 5}}, "shapes of the prior: others"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(other, message, tmp_path):
    model, settings = tiny_nvib(), {"max_steps": 4, "evaluate_every": 2, "checkpoint": tmp_path / "prior.pt"}
    fit(model, **settings)
    before, latents = model.latent_prior, cycles(model, 300, 0)
    if callable(other):
        latents = other(latents)
    else:
        settings |= other
    with pytest.raises(ValueError, match=rf"prior.pt' is of (another training: )?{message}"):
        model.fit_latent_prior(latents, cycles(model, 60, 1), **{"sizes": SIZES, **TRAINING, **settings})
    assert model.latent_prior is before


def test_a_checkpoint_is_of_latents_that_differ_by_roundings(tmp_path):
    model, settings = tiny_nvib(), {"max_steps": 4, "evaluate_every": 2, "checkpoint": tmp_path / "prior.pt"}
    history, latents = fit(model, **settings), cycles(model, 300, 0)
    latents.z = latents.z.bfloat16().float()
    again = model.fit_latent_prior(latents, cycles(model, 60, 1), **{"sizes": SIZES, **TRAINING, **settings})
    assert again == history


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_neither_the_fit_nor_what_is_asked_of_it(fitted, dtype):
    model = tiny_nvib()
    with torch.autocast("cpu", dtype):
        fit(model)
    for name, value in fitted.latent_prior.state_dict().items():
        torch.testing.assert_close(model.latent_prior.state_dict()[name], value, msg=name)
    latents = cycles(fitted, 5, 3)
    for ask in (fitted.log_prob, fitted.rate, lambda x: fitted.sample_latents(3, generator=seeded()).z):
        expected = ask(latents)
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(ask(latents), expected)


def test_inference_mode_leaves_a_prior_that_learns(fitted):
    model = tiny_nvib()
    with torch.inference_mode():
        fit(model)
    for name, value in fitted.latent_prior.state_dict().items():
        torch.testing.assert_close(model.latent_prior.state_dict()[name], value, msg=name)


# ------------------------------------------------------------------------------------------------------ draws
def test_draws_are_latents_of_the_model_and_of_the_prior(fitted):
    latents = fitted.sample_latents(200, generator=seeded())
    assert (latents.z[:, 0] == fitted.nvib.prior_mu).all()
    pi = latents.log_pi.exp()
    torch.testing.assert_close(pi.sum(-1), torch.ones(200))
    counts = (latents.log_pi > -torch.inf).sum(-1)
    assert {*counts.tolist()} == {4, 5, 6, 7} and torch.equal(latents.attention_mask, latents.log_pi > -torch.inf)
    torch.testing.assert_close(pi[:, 1], 1 / (counts - 1 + torch.tensor(1.2).exp()))
    prior = fitted.latent_prior
    z = latents.z[:, 1:]
    codes = prior.codes(z)
    torch.testing.assert_close(  # noise 0: the codes' means
        z, (prior.places[: z.shape[1]] + prior.centres[codes]).masked_fill(~latents.attention_mask[:, 1:, None], 0)
    )
    real = prior.codes(cycles(fitted, 200, 5).z[:, 1:])
    follow = {(a, b) for a, b in zip(real[:, 0].tolist(), real[:, 1].tolist(), strict=True)}
    drawn = list(zip(codes[:, 0].tolist(), codes[:, 1].tolist(), strict=True))
    assert sum(pair in follow for pair in drawn) > 180
    tokens = fitted.generate(encoder_outputs=latents[:3], max_new_tokens=4)
    assert len(tokens) == 3


def test_draws_are_seeded_and_of_the_lengths_that_are_given(fitted):
    draws = [fitted.sample_latents(5, generator=seeded(seed)) for seed in (0, 0, 1)]
    assert_same(draws[0], draws[1])
    assert draws[0].z.shape != draws[2].z.shape or not torch.equal(draws[0].z, draws[2].z)
    latents = fitted.sample_latents(3, num_vectors=[2, 7, 4], temperature=0.5, top_p=0.9, noise=1.0)
    assert (latents.log_pi > -torch.inf).sum(-1).tolist() == [2, 7, 4]
    assert (fitted.sample_latents(3, 5).log_pi > -torch.inf).all()


def test_without_a_learned_prior_all_is_as_before():
    model = tiny_nvib()
    latents = model.sample_latents(3, [2, 5, 3], generator=seeded())
    z, log_pi = model.nvib.sample_prior(~latents.attention_mask, seeded())
    assert torch.equal(latents.z, z) and torch.equal(latents.log_pi, log_pi)
    assert model.config.latent_prior is None and not any("latent_prior" in name for name in model.state_dict())


# ---------------------------------------------------------------------------------------------------- densities
def test_log_prob_is_the_priors_without_the_component_in_front(fitted):
    latents = cycles(fitted, 20, 2)
    expected = [fitted.latent_prior.log_prob(row.z[:, 1:][:, row.attention_mask[0, 1:]]).item() for row in latents]
    torch.testing.assert_close(fitted.log_prob(latents), torch.tensor(expected), rtol=1e-4, atol=1e-3)
    order = torch.tensor([0, 2, 1, 3, 4, 5, 6])
    salad = NvibLatents(z=latents.z[:, order], log_pi=latents.log_pi, attention_mask=latents.attention_mask)
    assert (fitted.log_prob(salad) < fitted.log_prob(latents) - 2).all()


def test_log_prob_and_rate_do_not_see_padding_dropped_vectors_or_the_mode(fitted):
    latents = cycles(fitted, 8, 2)
    whole = fitted.log_prob(latents), fitted.rate(latents)
    alone = [fitted.log_prob(row.compact()).item() for row in latents]
    torch.testing.assert_close(whole[0], torch.tensor(alone), rtol=1e-4, atol=1e-3)
    left = torch.tensor([0, 7, 8, 1, 2, 3, 4, 5, 6])  # padding between the prior's component and the text
    padded = {"z": latents.z, "logvar": latents.logvar, "log_pi": latents.log_pi}
    fill = {"z": 3.0, "logvar": 3.0, "log_pi": -torch.inf}
    padded = {
        name: torch.cat([x, torch.full_like(x[:, :2], fill[name])], dim=1)[:, left] for name, x in padded.items()
    }
    moved = NvibLatents(**padded, attention_mask=torch.ones(8, 9, dtype=torch.bool))  # vectors, but dropped
    fitted.train()
    try:
        for found, expected in zip((fitted.log_prob(moved), fitted.rate(moved)), whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert fitted.latent_prior.training
    finally:
        fitted.eval()


def test_rate_bounds_the_draws_and_falls_with_what_is_known(fitted):
    """Monte Carlo is in the layer's tests; here: of what was learnt far below that of its opposite."""
    latents = cycles(fitted, 50, 2)
    order = torch.tensor([0, 2, 1, 3, 4, 5, 6])
    salad = NvibLatents(
        z=latents.z[:, order], logvar=latents.logvar, log_pi=latents.log_pi, attention_mask=latents.attention_mask
    )
    assert (fitted.rate(latents) < fitted.rate(salad) - 2).all() and (fitted.rate(latents) > 0).all()


# ---------------------------------------------------------------------------------------------- kept with the model
def test_saved_is_loaded(fitted, tmp_path):
    fitted.save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}):
        loaded = NvibForConditionalGeneration.from_pretrained(tmp_path, **options)
        assert loaded.config.latent_prior == fitted.config.latent_prior
        state = fitted.latent_prior.state_dict()
        for name, value in loaded.latent_prior.state_dict().items():
            assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
        assert not any(p.requires_grad for p in loaded.latent_prior.parameters())
        ours, theirs = (model.sample_latents(5, generator=seeded()) for model in (fitted, loaded))
        assert_same(ours.to(loaded.dtype), theirs)
        latents = cycles(fitted, 5, 2)
        assert torch.equal(loaded.log_prob(latents), fitted.log_prob(latents))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["latent_prior"] == {**SIZES, "max_length": 6}


def test_casts_of_the_model_leave_the_prior_in_single_precision(fitted):
    model = tiny_nvib(latent_prior=fitted.config.latent_prior)
    model.latent_prior.load_state_dict(fitted.latent_prior.state_dict())
    latents, before = cycles(fitted, 5, 2), fitted.log_prob(cycles(fitted, 5, 2))
    model.bfloat16()
    assert torch.equal(model.log_prob(latents), before)
    assert model.sample_latents(2, generator=seeded()).z.dtype == torch.bfloat16


def test_a_model_that_is_trained_on_keeps_its_prior(fitted):
    model = tiny_nvib(latent_prior=fitted.config.latent_prior).train()
    model(**tiny_inputs("bart"), labels=tiny_inputs("bart")["input_ids"]).loss.backward()
    assert all(p.grad is None for p in model.latent_prior.parameters())


LOAD = """
import sys

class Blocked:
    def find_spec(self, name, *arguments):
        assert name.split(".")[0] != "nvib_hf", "the package is not here"

sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForSeq2SeqLM
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
latents = model.sample_latents(3, generator=torch.Generator().manual_seed(0))
print("LOADED", latents.z.double().sum().item(), model.log_prob(latents).tolist()[0])
"""


def test_code_beside_the_weights_draws_without_the_package(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "model")
    assert {"layers_latent_prior.py", "layers_codebook.py"} <= {p.name for p in (tmp_path / "model").iterdir()}
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "model"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    total, log_prob = map(float, done.stdout.partition("LOADED ")[2].split())
    latents = fitted.sample_latents(3, generator=seeded())
    assert total == pytest.approx(latents.z.double().sum().item(), rel=1e-5)
    assert log_prob == pytest.approx(fitted.log_prob(latents)[0].item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------------- errors
def narrow(latents: NvibLatents) -> NvibLatents:
    return NvibLatents(z=latents.z[..., :-1], log_pi=latents.log_pi, attention_mask=latents.attention_mask)


def points(latents: NvibLatents) -> NvibLatents:
    return NvibLatents(z=latents.z, log_pi=latents.log_pi, attention_mask=latents.attention_mask)


def of_kappa(latents: NvibLatents) -> NvibLatents:
    latents.kappa = torch.full((len(latents),), 2)
    return latents


REFUSED = [
    (lambda m, x: m.sample_latents(0), "num_samples must be a whole number of at least 1, but got 0"),
    (lambda m, x: m.sample_latents(2, 1), "num_vectors must be whole numbers from 2, .* to 7, .* but got 1"),
    (lambda m, x: m.sample_latents(2, [3, 8]), r"num_vectors must be whole numbers from 2, .* but got \[3, 8\]"),
    (lambda m, x: m.sample_latents(2, top_p=0.0), r"top_p must be in \(0, 1\], but got 0.0"),
    (lambda m, x: m.log_prob(narrow(x)), "The latents are .* wide, but this model's are"),
    (lambda m, x: m.rate(narrow(x)), "The latents are .* wide, but this model's are"),
    (lambda m, x: m.rate(points(x)), "The latents are samples, whose rate is not known"),
    (lambda m, x: m.fit_latent_prior(points(x), x), "latents are samples. Pass posteriors"),
    (lambda m, x: m.fit_latent_prior(x, x, sizes={"max_length": 5}, **TRAINING), "z has 6 vectors a row"),
    (
        lambda m, x: m.fit_latent_prior(x, x, sizes={"num_codes": 99}, **TRAINING),
        "num_codes is 99, but there are only",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_refused_is_named_and_changes_nothing(fitted, call, message):
    before, sizes = fitted.latent_prior, fitted.config.latent_prior
    with pytest.raises(ValueError, match=message):
        call(fitted, cycles(fitted, 5, 2))
    assert fitted.latent_prior is before and fitted.config.latent_prior is sizes


def test_draws_of_several_vectors_for_each_are_refused():
    model = tiny_nvib(kappa=2, latent_prior={**SIZES, "max_length": 9})
    model.latent_prior.is_fitted.fill_(True)
    with pytest.raises(ValueError, match=r"draws of kappa=2 vectors .* encode\(..., sample=False\)"):
        model.log_prob(model.encode(**tiny_inputs("bart"), sample=True))


def test_models_without_a_learned_prior_say_so(fitted):
    bare, unfitted = tiny_nvib(), tiny_nvib(latent_prior=SIZES)
    latents = cycles(bare, 2, 0)
    for model, state in ((bare, "has no learned prior"), (unfitted, "was never fitted")):
        for name in ("log_prob", "rate"):
            with pytest.raises(ValueError, match=f"{name} needs a learned prior, but .*{state}.*fit_latent_prior"):
                getattr(model, name)(latents)
    with pytest.raises(ValueError, match=r"sample_latents needs a learned prior, but .* never fitted"):
        unfitted.sample_latents(2)
    with pytest.raises(ValueError, match="Only a learned prior can draw num_vectors, and this model has none"):
        bare.sample_latents(2)
    with pytest.raises(ValueError, match="Only a learned prior can heed temperature, top_p or noise"):
        bare.sample_latents(2, 5, temperature=0.5)
    with pytest.raises(TypeError, match=r"latents must be NvibLatents, but got list. Pass encode_texts"):
        fitted.fit_latent_prior(["a text"], latents)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"codes": 5}, TypeError, "latent_prior has no size 'codes', but num_codes"),
        (True, TypeError, "latent_prior"),
        ({"num_layers": 0}, ValueError, "num_layers must be a whole number of at least 1, but got 0"),
        ({"d_model": 10}, ValueError, "d_model must be a multiple of num_heads, but got 10 and 4"),
    ],
)
def test_sizes_that_cannot_be_are_named(setting, error, message):
    with pytest.raises(error, match=message):
        NvibConfig(latent_prior=setting)


def test_sizes_are_those_left_out_too():
    assert NvibConfig(latent_prior={"num_codes": 7}).latent_prior == {
        "num_codes": 7,
        "d_model": 192,
        "num_layers": 4,
        "num_heads": 4,
        "max_length": 64,
    }


def test_an_encoder_with_a_head_has_no_latents_to_draw():
    base = BertForSequenceClassification(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ValueError, match="latent_prior needs a decoder, but an encoder with a head has none"):
        NvibForSequenceClassification.from_base_pretrained(base, latent_prior={})


def test_latents_of_speech_are_taken():
    model = tiny_nvib("whisper")
    latents = model.encode(**tiny_inputs("whisper"))
    model.fit_latent_prior(latents, latents, sizes={**SIZES, "num_codes": 2}, max_steps=2, progress=False)
    assert model.log_prob(latents).isfinite().all() and model.sample_latents(2).z.isfinite().all()
