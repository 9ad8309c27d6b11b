"""A learned prior that is trained with its model: what the loss charges, what learns, what is saved and refused."""

import copy
import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_latents import assert_same
from tiny_nvib import tiny_nvib
from tiny_prior import SIZES, cycles, fit
from tiny_training import WITH_PEFT

from nvib_hf import NvibConfig, NvibForConditionalGeneration
from nvib_hf.latents.learned import vectors_of

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]]),
    "attention_mask": torch.tensor([[1] * 4, [1, 1, 1, 0]]),
}
LABELS = torch.tensor([[5, 6, 7, 2], [8, 9, 2, -100]])


def unfrozen(frozen: bool = False, **settings) -> NvibForConditionalGeneration:
    """A model with a fitted prior, trained along with it unless it is ``frozen``."""
    model = tiny_nvib(**{"lambda_gaussian": 0.1, **settings})
    model.config.merge_share = 1.0
    fit(model, sizes={**SIZES, "max_length": 8})
    if not frozen:
        model.unfreeze_latent_prior(cycles(model, 300, 0))
    model.config.merge_share = settings.get("merge_share", 1.0)
    return model


def steady(model: NvibForConditionalGeneration) -> NvibForConditionalGeneration:
    """In training, but without dropout and moving codes."""
    model.train()
    model.latent_prior.eval()
    model.latent_prior.moving.follow = lambda *given: None
    return model


def nats(model: NvibForConditionalGeneration, outputs) -> torch.Tensor:
    """``kl_gaussian`` of :data:`BATCH` as nats of an input."""
    return outputs.kl_gaussian * torch.tensor([5, 4]) * model.nvib.size_out


@pytest.mark.parametrize("training", [True, False])
def test_the_loss_charges_the_rate(training):
    model, other = unfrozen(), unfrozen(frozen=True)
    expected = other.rate(other.encode(**BATCH))
    outputs = (steady(model) if training else model)(**BATCH, labels=LABELS, generator=torch.Generator())
    torch.testing.assert_close(nats(model, outputs), expected, rtol=1e-5, atol=1e-4)
    other.train(training)
    independent = other(**BATCH, labels=LABELS, generator=torch.Generator())
    assert (independent.kl_gaussian - outputs.kl_gaussian).abs().min() > 0.1
    mean = (outputs.kl_gaussian * torch.tensor([4, 3])).sum() / 7
    torch.testing.assert_close(outputs.loss - outputs.cross_entropy, 0.1 * mean + 0 * independent.loss)
    torch.testing.assert_close(outputs.cross_entropy, independent.cross_entropy)


def test_padding_at_the_left_and_dropped_vectors_cost_nothing():
    model = unfrozen()
    left = {"input_ids": torch.tensor([[0, 8, 9, 2]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    mu, mask, logvar = vectors_of(model.encode(**left))
    outputs = model(**left, labels=LABELS[1:])
    torch.testing.assert_close(
        outputs.kl_gaussian * 4 * model.nvib.size_out, model.latent_prior.rate(mu, logvar, mask), rtol=1e-5, atol=1e-4
    )
    pseudo_counts = model.encode(**BATCH).log_alpha[:, 1:].exp()
    dropping = unfrozen(alpha_threshold=pseudo_counts[0].median().item())
    latents = dropping.encode(**BATCH)
    assert latents.num_vectors[0] == 2 and latents.num_vectors[1] > 0
    torch.testing.assert_close(
        nats(dropping, dropping(**BATCH, labels=LABELS)), dropping.rate(latents), rtol=1e-5, atol=1e-4
    )


def test_merged_vectors_cost_what_the_mean_of_their_draws_does():
    """By one pair, merged by hand: the posterior decides which, the weights are the masses of the draws."""
    model = unfrozen(merge_share=0.75)
    outputs = steady(model)(**BATCH, labels=LABELS, generator=torch.Generator().manual_seed(1))
    model.config.merge_share = 1.0
    drawn = model.encode(**BATCH, generator=torch.Generator().manual_seed(1))
    posterior = model.encode(**BATCH, sample=False)
    of_draws, log_mass = (x.attended(model.scale, "means").bias[0, 1:5] for x in (drawn, posterior))
    log_mass = log_mass - log_mass.logsumexp(0) + math.log(4)
    mu, logvar = (list(x[0, 1:5].detach()) for x in (posterior.z, posterior.logvar))
    costs = {}
    for i, j in itertools.combinations(range(4), 2):
        a, b = log_mass[[i, j]].exp()
        costs[i, j] = min(1, 2 * a * b / (a + b)) * (mu[i] - mu[j]).square().sum()
    i, j = min(costs, key=costs.get)
    weight = torch.softmax(of_draws[[i, j]], 0)
    mu[i] = weight[0] * mu[i] + weight[1] * mu[j]
    logvar[i] = (weight[0].square() * logvar[i].exp() + weight[1].square() * logvar[j].exp()).log()
    del mu[j], logvar[j]
    expected = model.latent_prior.nats(torch.stack(mu)[None], torch.stack(logvar)[None], torch.ones(1, 3).bool())
    torch.testing.assert_close(nats(model, outputs)[:1], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("what", ["all", "the prior alone"])
def test_plain_training_lowers_the_rate(what):
    """A loop of one's own, on the model's loss alone."""
    model = unfrozen(frozen=True, lambda_gaussian=1.0)
    if what == "the prior alone":
        model.requires_grad_(False)
    model.unfreeze_latent_prior(model.encode(**BATCH), batch_size=2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    rates = []
    for step in range(60):
        outputs = model(**BATCH, labels=LABELS, generator=torch.Generator().manual_seed(step))
        rates.append(nats(model, outputs).mean().item())
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert sum(rates[-5:]) < (0.7 if what == "all" else 0.95) * sum(rates[:5])
    moved = {
        name.partition(".")[0] for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved == ({"base", "nvib", "latent_prior"} if what == "all" else {"latent_prior"})
    model.eval()
    model.freeze_latent_prior()
    assert model.sample_latents(3).z.isfinite().all() and not any(
        p.requires_grad for p in model.latent_prior.parameters()
    )


def test_codes_move_in_training_alone():
    model = unfrozen()
    centres = model.latent_prior.centres.clone()
    model(**BATCH, labels=LABELS)
    assert torch.equal(model.latent_prior.centres, centres)
    model.train()(**BATCH, labels=LABELS)
    assert not torch.equal(model.latent_prior.centres, centres)


def test_two_passes_and_one_backward():
    """As gradient accumulation by hand: the codes of the first pass have moved on before its gradients are taken."""
    model = unfrozen().train()
    (model(**BATCH, labels=LABELS).loss + model(**BATCH, labels=LABELS).loss).backward()
    assert model.latent_prior.code_bias.grad.abs().sum() > 0


def test_freezing_ends_it():
    model, other = unfrozen(), unfrozen(frozen=True)
    model.freeze_latent_prior()
    outputs, expected = (x(**BATCH, labels=LABELS) for x in (model, other))
    torch.testing.assert_close(outputs.kl_gaussian, expected.kl_gaussian)
    assert model.state_dict().keys() == other.state_dict().keys()
    model.unfreeze_latent_prior(cycles(model, 300, 0))
    fit(model, sizes=None, max_steps=2)
    assert model.config.latent_prior_frozen and model.latent_prior.moving is None


def test_a_saved_model_goes_on_where_it_was(tmp_path):
    model = unfrozen().train()
    model(**BATCH, labels=LABELS)
    model.eval().save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert not loaded.config.latent_prior_frozen and all(p.requires_grad for p in loaded.latent_prior.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert_same(loaded.encode(**BATCH), model.encode(**BATCH))
    losses = []
    for each in (model, copy.deepcopy(model), loaded):
        each.train()
        torch.manual_seed(0)
        losses.append([each(**BATCH, labels=LABELS).loss.item() for _ in range(3)])
    assert losses[0] == losses[1] == losses[2]


def test_states_of_another_kind_are_refused():
    frozen, other = unfrozen(frozen=True), unfrozen()
    with pytest.raises(ValueError, match=r"saved with its learned prior in.*unfreeze_latent_prior\(latents\)"):
        frozen.load_state_dict(other.state_dict(), strict=False)
    with pytest.raises(ValueError, match=r"saved without its learned prior in.*freeze_latent_prior\(\) first"):
        other.load_state_dict(frozen.state_dict())
    other.load_state_dict(other.state_dict())
    frozen.load_state_dict(frozen.state_dict())
    frozen.load_state_dict(tiny_nvib().state_dict(), strict=False)


def test_it_compiles_without_a_break():
    model = unfrozen().train()
    model.latent_prior.eval()  # without dropout
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second time with codes that have moved
        got, expected = (x(**BATCH, labels=LABELS).kl_gaussian for x in (compiled, other))
        torch.testing.assert_close(got, expected)


def test_a_prior_that_was_never_fitted_is_refused():
    model = tiny_nvib(latent_prior=SIZES, latent_prior_frozen=False, lambda_gaussian=0.1)
    with pytest.raises(ValueError, match=r"latent_prior_frozen=False needs a learned prior, but .* never fitted"):
        model(**BATCH, labels=LABELS)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda m: m.config.__setattr__("lambda_gaussian", 0.0), ValueError, "lambda_gaussian is 0"),
        (lambda m: m.config.__setattr__("kappa", 2), ValueError, "kappa is 2"),
        (lambda m: m.__setattr__("latent_prior", None), ValueError, "unfreeze_latent_prior needs a learned prior"),
    ],
)
def test_what_it_does_not_go_with_is_refused(spoil, error, message):
    model = unfrozen(frozen=True)
    latents = cycles(model, 20, 0)
    spoil(model)
    with pytest.raises(error, match=message):
        model.unfreeze_latent_prior(latents)
    assert model.config.latent_prior_frozen


def test_the_setting_alone_is_refused():
    model = unfrozen(frozen=True)
    model.config.latent_prior_frozen = False
    with pytest.raises(ValueError, match=r"Call model.unfreeze_latent_prior\(latents\)"):
        model(**BATCH, labels=LABELS)


@WITH_PEFT
def test_adapters_are_saved_without_it_and_say_so():
    model, lora = unfrozen(frozen=True), {"target_modules": ["q_proj"], "r": 2}
    adapted = get_peft_model(model, LoraConfig(**lora))
    with pytest.warns(UserWarning, match=r"Saving them does not save the learned prior.*merge_and_unload\(\)"):
        adapted.unfreeze_latent_prior(cycles(model, 300, 0))
    whole = adapted.merge_and_unload()
    assert whole.latent_prior.moving is not None and not hasattr(whole, "peft_config")


@WITH_PEFT
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": "all-linear"}, {"target_modules": ["q_proj"], "modules_to_save": ["latent_prior"]}],
    ids=str,
)
def test_an_adapter_in_the_prior_is_refused(settings):
    model = unfrozen(frozen=True)
    adapted = get_peft_model(model, LoraConfig(**settings, r=2))
    with pytest.raises(
        ValueError, match=r"exclude_modules=r\"latent_prior\\\..*without latent_prior in modules_to_save"
    ):
        adapted.unfreeze_latent_prior(cycles(model, 300, 0))
    assert model.config.latent_prior_frozen


def test_latents_and_inputs_that_do_not_fit_are_refused():
    model = unfrozen(frozen=True)
    with pytest.raises(TypeError, match="latents must be NvibLatents, but got list"):
        model.unfreeze_latent_prior(["a text"])
    with pytest.raises(ValueError, match="latents are samples"):
        model.unfreeze_latent_prior(model.encode(**BATCH, sample=True))
    with pytest.raises(ValueError, match="latents have 3 vectors, fewer than the 4 codes of the prior"):
        model.unfreeze_latent_prior(next(x for x in cycles(model, 20, 0) if x.attention_mask.sum() == 1 + 3))
    with pytest.raises(ValueError, match="batch_size"):
        model.unfreeze_latent_prior(cycles(model, 20, 0), batch_size=0)
    model.unfreeze_latent_prior(cycles(model, 20, 0))
    long = torch.full((1, 9), 5)
    with pytest.raises(ValueError, match=r"inputs have 9 vectors, padding included, but .* max_length is 8"):
        model(input_ids=long, labels=long)
    with pytest.raises(ValueError, match="latent_prior_frozen=False needs a learned prior"):
        NvibConfig(latent_prior_frozen=False)
