"""Merged latents: what attention reads of them, what their fields say, and every architecture on fewer vectors."""

import copy
import math

import pytest
import torch
from tiny_latents import INF, mixture, sample
from tiny_models import FAMILIES, decoder_inputs, row_of, tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import generate, tiny_nvib

from nvib_hf import NvibConfig, NvibForConditionalGeneration, NvibLatents, concatenate_latents
from nvib_hf.latents.merging import merged, merged_groups

SCALE = 0.4
over_families = pytest.mark.parametrize("family", FAMILIES)
over_evaluations = pytest.mark.parametrize("evaluation", ["means", "mixture"])


def log_mass(latents: NvibLatents, evaluation: str) -> torch.Tensor:
    return latents.attended(SCALE, evaluation).bias


def texts() -> NvibLatents:
    """As of texts, with a dropped vector in the first."""
    latents = mixture(length=9)
    latents.log_pi[0, 4] = -INF
    latents.log_pi = latents.log_pi.log_softmax(-1)
    return latents


# ------------------------------------------------------------------------------------ what attention reads
@over_evaluations
def test_mass_and_mean_are_kept(evaluation):
    """Against the prior's component, which is what it is weighed with, and the same in both."""
    latents = texts()
    made = merged(latents, SCALE, evaluation, num_vectors=3)
    assert made.attention_mask.sum(-1).tolist() == [4] * 4
    for name in ("z", "logvar"):
        torch.testing.assert_close(made[name][:, 0], latents[name][:, 0])
    before, after = (log_mass(x, evaluation) for x in (latents, made))
    before, after = before - before[:, :1], after - after[:, :1]
    torch.testing.assert_close(after.logsumexp(-1), before.logsumexp(-1))
    means = [(x.exp()[..., None] * y.z).sum(1) for x, y in ((before, latents), (after, made))]
    torch.testing.assert_close(*means)
    torch.testing.assert_close(made.log_pi.logsumexp(-1), latents.log_pi.logsumexp(-1))


@over_evaluations
def test_equal_vectors_merge_exactly(evaluation):
    """The decoder writes the same logits from each vector three times as from the one with three times the weight."""
    model, tokens = tiny_nvib(evaluation=evaluation), decoder_inputs()
    with torch.no_grad():
        latents = model.encode(**tiny_inputs("bart"))
        order = torch.arange(latents.z.shape[1]).repeat_interleave(3)[2:]  # the prior's once
        fields = {name: x[:, order] if x.dim() > 1 else x for name, x in latents.items()}
        fields["log_pi"] = fields["log_pi"].log_softmax(-1)
        made = model.merge_latents(NvibLatents(**fields), cost=0)
        assert made.z.shape == latents.z.shape
        torch.testing.assert_close(made.z, latents.z)
        expected = model(encoder_outputs=NvibLatents(**fields), decoder_input_ids=tokens).logits
        torch.testing.assert_close(model(encoder_outputs=made, decoder_input_ids=tokens).logits, expected)


def test_the_spread_becomes_variance():
    latents = mixture(batch=1, length=3)
    weight = log_mass(latents, "means")[0, 1:].softmax(-1)[:, None]
    made = merged(latents, SCALE, "means", num_vectors=1)
    mean = (weight * latents.z[0, 1:]).sum(0)
    variance = (weight * (latents.logvar[0, 1:].exp() + (latents.z[0, 1:] - mean).square())).sum(0)
    torch.testing.assert_close(made.z[0, 1], mean)
    torch.testing.assert_close(made.logvar[0, 1].exp(), variance)


def test_samples_are_merged_as_points():
    latents = sample(length=7)
    made = merged(latents, SCALE, "means", num_vectors=2)
    assert made.logvar is None and set(made.keys()) == {"z", "log_pi", "attention_mask"}
    assert made.z.shape[1] == 2  # from the prior: there is no component that is the prior's alone
    before, after = (log_mass(x, "means") for x in (latents, made))
    means = [(x.softmax(-1)[..., None] * y.z).sum(1) for x, y in ((before, latents), (after, made))]
    torch.testing.assert_close(*means)


def test_padding_and_what_is_dropped_stay_out():
    latents = texts()
    made = merged(latents, SCALE, "means", share=0.5)
    for row in range(4):
        seen = latents.log_pi[row] > -INF
        fields = {name: x[row : row + 1, seen] if x.dim() > 1 else x[[row]] for name, x in latents.items()}
        alone = merged(NvibLatents(**fields), SCALE, "means", share=0.5)
        number = alone.z.shape[1]
        for name in ("z", "logvar"):
            torch.testing.assert_close(made[name][row, :number], alone[name][0])
        # The weight of what was dropped was gone before.
        torch.testing.assert_close(made.log_pi[row, :number], alone.log_pi[0])
        assert (made.log_pi[row, number:] == -INF).all() and not made.attention_mask[row, number:].any()


# ------------------------------------------------------------------------------------ what the fields say
def test_counts_tell_the_truth():
    latents = texts()
    latents.num_vectors[0] -= 1
    latents.prop_vectors[0] = latents.num_vectors[0] / 8
    made = merged(latents, SCALE, "means", num_vectors=[3, 1, 2, 100])
    assert made.num_vectors.tolist() == [3, 1, 2, 8]
    torch.testing.assert_close(made.prop_vectors, torch.tensor([3 / 8, 1 / 7, 2 / 6, 1.0]))
    weights = made.log_pi.softmax(-1)
    torch.testing.assert_close(made.effective_vectors, torch.special.entr(weights).sum(-1).exp())
    for name in ("kl_gaussian", "kl_dirichlet"):
        assert torch.equal(made[name], latents[name])
    torch.testing.assert_close(made.log_alpha.log_softmax(-1), made.log_pi)
    seen = latents.log_alpha.masked_fill(latents.log_pi == -INF, -INF)
    torch.testing.assert_close(made.log_alpha.logsumexp(-1), seen.logsumexp(-1))


def test_draws_of_a_component_count_once():
    model = tiny_nvib(kappa=3)
    latents = model.encode(**tiny_inputs("bart"), sample=True, generator=torch.manual_seed(0))
    made = model.merge_latents(latents, share=1 / 3)
    torch.testing.assert_close(made.num_vectors, torch.tensor([9, 5, 7]) / 3)
    torch.testing.assert_close(made.prop_vectors, torch.full((3,), 1 / 3))
    assert torch.equal(made.z[:, :3], latents.z[:, :3])  # the prior's draws
    model(encoder_outputs=made, decoder_input_ids=decoder_inputs())
    model.generate(encoder_outputs=model.merge_latents(made, num_vectors=1), max_new_tokens=2)


def test_merged_latents_are_latents():
    """Saved, joined, varied, and between others."""
    model = tiny_nvib()
    latents = model.encode(**tiny_inputs("bart")).detach()
    made = model.merge_latents(latents, share=0.5)
    assert concatenate_latents([made, latents]).batch_size == 6
    assert model.vary_latents(made, redraw_weights=True, generator=torch.manual_seed(0)).z.shape == made.z.shape
    between = model.interpolate_latents(made, latents, 0.5, method="mixture")
    again = model.merge_latents(between, num_vectors=1)
    assert again.z.shape[1] == 1
    torch.testing.assert_close(between.log_pi.logsumexp(-1), torch.zeros(3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of num_vectors, share and cost, but got none"),
        ({"share": 0.5, "cost": 1.0}, "but got share and cost"),
        ({"share": 1.5}, r"share must be in \(0, 1\], but got 1.5"),
        ({"share": 0.5, "order": "time"}, "order must be one of 'neighbours', 'any'"),
    ],
)
def test_errors(given, message):
    model = tiny_nvib()
    with pytest.raises(ValueError, match=message):
        model.merge_latents(model.encode(**tiny_inputs("bart")), **given)
    with pytest.raises(ValueError, match="6 wide, but this model's are 32"):
        model.merge_latents(mixture(), share=0.5)


# ------------------------------------------------------------------------------------ the setting
@pytest.mark.parametrize(
    ("share", "error", "message"),
    [(0, ValueError, r"merge_share must be in \(0, 1\], but got 0"), (1.5, ValueError, "but got 1.5"),
     (math.nan, ValueError, "but got nan"), ([0.5, 0.2], TypeError, "must be"), ("half", TypeError, "must be")],
)  # fmt: skip
def test_shares_are_checked(share, error, message):
    with pytest.raises(error, match=message):
        NvibConfig(base_config=tiny_base("bart").config, merge_share=share)
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    with pytest.raises(error, match=message):
        model.encode(**inputs, merge_share=share)
    with pytest.raises(error, match=message):
        model.generate(**inputs, merge_share=share)


def test_given_latents_are_not_merged_again():
    model = tiny_nvib(merge_share=0.5)
    latents = model.encode(**tiny_inputs("bart"))
    with pytest.raises(ValueError, match=r"encoder_outputs=model.merge_latents\(latents, share=0.2\)"):
        model.generate(encoder_outputs=latents, merge_share=0.2)
    expected = model.generate(encoder_outputs=latents, max_new_tokens=5)
    model.config.merge_share = 0.1
    assert torch.equal(model.generate(encoder_outputs=latents, max_new_tokens=5), expected)


def test_settings_are_checked_when_they_are_set_later():
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    for settings, error, message in (
        ({"merge_share": 2}, ValueError, "merge_share must be in .0, 1., but got 2"),
        ({"merge_cost": None}, TypeError, "merge_cost must be a number, but got None"),
        ({"training_merge_share": 0}, ValueError, "training_merge_share must be in"),
        ({"merge_share": 0.5, "merge_cost": 1.0}, ValueError, "both say how far to merge"),
    ):
        fresh = copy.deepcopy(model)
        for name, value in settings.items():
            setattr(fresh.config, name, value)
        with pytest.raises(error, match=message):
            fresh.encode(**inputs)
    with pytest.raises(TypeError, match=r"takes no argument 'merge_cost'. Set model.config.merge_cost"):
        model(**inputs, labels=tiny_labels("bart"), merge_cost=1.0)


def test_what_is_merged_must_be_latents_by_numbers():
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    with pytest.raises(TypeError, match=r"latents must be NvibLatents, but got Tensor. Pass what model.encode\(\)"):
        model.merge_latents(torch.zeros(1, 3, 32), share=0.5)
    with pytest.raises(TypeError, match="share must be a number or one for each example, but got 'half'"):
        model.merge_latents(model.encode(**inputs), share="half")


def test_costs_are_checked():
    config, model, inputs = tiny_base("bart").config, tiny_nvib(), tiny_inputs("bart")
    for give in (
        lambda **limit: NvibConfig(base_config=config, **limit),
        lambda **limit: model.encode(**inputs, **limit),
        lambda **limit: model.generate(**inputs, **limit),
    ):
        with pytest.raises(ValueError, match="merge_cost must be 0 or positive, but got -1"):
            give(merge_cost=-1.0)
        with pytest.raises(ValueError, match=r"merge_share=0.5 and merge_cost=2.0 both say how far to merge"):
            give(merge_share=0.5, merge_cost=2.0)
    with pytest.raises(ValueError, match=r"encoder_outputs=model.merge_latents\(latents, cost=2.0\)"):
        model.generate(encoder_outputs=model.encode(**inputs), merge_cost=2.0)


@torch.no_grad()
def test_a_cost_as_setting_is_that_of_merged_latents(tmp_path):
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    full = model.encode(**inputs)
    cost = next(
        c for c in torch.logspace(-3, 3, 200).tolist() if model.merge_latents(full, cost=c).num_vectors.max() < 7
    )
    expected = model.merge_latents(full, cost=cost)
    for made in (model.encode(**inputs, merge_cost=cost), set_cost(model, cost).encode(**inputs)):
        assert torch.equal(made.num_vectors, expected.num_vectors) and torch.equal(made.z, expected.z)
    written = generate(model, {"encoder_outputs": expected})
    assert torch.equal(generate(model, inputs), written)
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.merge_cost == cost and torch.equal(generate(loaded, inputs), written)
    assert torch.equal(model.encode(**inputs, merge_cost=0).num_vectors, full.num_vectors)
    assert torch.equal(
        model.encode(**inputs, merge_share=1.0).num_vectors, full.num_vectors
    )  # the call's, not the cost
    assert model.encode(**inputs, merge_share=0.25).num_vectors.tolist() == [2, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"kappa": 2}], ids=str)
def test_a_cost_that_leaves_one_vector_is_warned_of(settings, monkeypatch):
    said = []
    monkeypatch.setattr("nvib_hf.latents.merging.logger.warning_once", said.append)
    model, inputs = tiny_nvib(**settings), tiny_inputs("bart")
    one = {name: x[:1, :1] for name, x in inputs.items()}
    for mode in (model.eval, model.train):
        mode()
        for quiet in ({"merge_share": 0.01}, {"merge_cost": 1e-6}, {}):
            model.encode(**inputs, **quiet)
        model.encode(**one, merge_cost=1e9)  # a single vector before, too
        assert model.merge_latents(model.encode(**inputs), cost=1e9).num_vectors.max() <= 1  # that is to try costs
        assert not said
        assert model.encode(**inputs, merge_cost=1e9).num_vectors.max() <= 1
        assert len(said) == 1 and said.pop().startswith("merge_cost=1000000000.0 merges all vectors of an input")
    set_cost(model.eval(), 5e8).generate(**inputs, max_new_tokens=2)
    assert len(said) == 1 and "merge_cost=500000000.0" in said[0] and "merge_latents(latents, cost=cost)" in said[0]


def set_cost(model: NvibForConditionalGeneration, cost: float) -> NvibForConditionalGeneration:
    model.config.merge_cost = cost
    return model


def test_a_call_has_the_last_word():
    model, inputs = tiny_nvib(merge_share=0.5), tiny_inputs("bart")
    assert model.encode(**inputs).num_vectors.tolist() == [4, 2, 4]
    assert model.encode(**inputs, merge_share=1.0).num_vectors.tolist() == [9, 5, 7]
    assert model.encode(**inputs).num_vectors.tolist() == [4, 2, 4]


def masses(latents: NvibLatents, model: NvibForConditionalGeneration) -> torch.Tensor:
    """The mass of a source's vectors together, in masses of the prior's component, by the formula of attention.

    A mean counts as a point, less the half of its variance.
    """
    squares = latents.z.square().sum(-1) + latents["logvar"].exp().sum(-1)
    bias = latents.log_pi - 0.5 * model.scale * squares
    mass = (bias - bias[:, :1]).exp()
    return mass[:, 1:].sum(-1)


@over_families
@torch.no_grad()
def test_every_architecture_reads_fewer_vectors(family, tmp_path):
    model, inputs, tokens = tiny_nvib(family), tiny_inputs(family), decoder_inputs()
    full = model.encode(**inputs)
    logits = model(**inputs, decoder_input_ids=tokens).logits
    same = model.merge_latents(full, share=1.0)
    torch.testing.assert_close(model(encoder_outputs=same, decoder_input_ids=tokens).logits, logits, atol=1e-3, rtol=0)
    made = model.merge_latents(full, share=0.25)
    expected = (full.num_vectors * 0.25).round().clamp(min=1)
    assert torch.equal(made.num_vectors, expected) and made.z.shape[1] == expected.max() + 1
    torch.testing.assert_close(made.log_pi.exp().sum(-1), torch.ones(3))
    of_source, of_merged = (masses(latents, model) for latents in (full, made))
    torch.testing.assert_close(of_merged, of_source, rtol=1e-4, atol=0)
    for settings in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        written = generate(model, {"encoder_outputs": made}, **settings)
        assert torch.equal(generate(model, {**inputs, "merge_share": 0.25}, **settings), written)
    model.config.merge_share = 0.25
    model.save_pretrained(tmp_path)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path)
    output = loaded(**inputs, decoder_input_ids=tokens)
    assert torch.equal(output.num_vectors, expected)
    of_made = model(encoder_outputs=made, decoder_input_ids=tokens).logits
    error = (output.logits - of_made).abs().max()
    assert error < 1e-3 and (output.logits - logits).abs().max() > 10 * error  # it is not the same any more
    assert torch.equal(generate(loaded, inputs, num_beams=3), generate(model, inputs, num_beams=3))
    if family not in ("fsmt", "prophetnet"):  # which generate something else without a cache by themselves
        assert torch.equal(generate(loaded, inputs, use_cache=False), generate(loaded, inputs))


@pytest.mark.parametrize("family", ["bart", "t5", "speech_to_text", "vit2gpt2"])
@pytest.mark.parametrize("settings", [{"kappa": 2}, {"alpha_threshold": 3.0}], ids=["draws", "dropping"])
def test_training_reaches_everything(family, settings):
    model = tiny_nvib(family, merge_share=0.4, lambda_gaussian=0.1, lambda_dirichlet=0.1, **settings).train()
    output = model(**tiny_inputs(family), labels=tiny_labels(family))
    assert (output.prop_vectors <= 0.5).all()
    output.loss.backward()
    for name, parameter in model.nvib.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("limit", [{"merge_share": 0.5}, {"merge_cost": 30.0}], ids=str)
@pytest.mark.parametrize("kappa", [1, 2])
def test_training_merges_what_evaluation_merges(kappa, limit):
    """The draws of the vectors that evaluation merges, weighed by their masses, however noisy they are."""
    model, inputs = tiny_nvib(kappa=kappa, tau_sigma=2.0), tiny_inputs("bart")
    drawn = model.encode(**inputs, sample=True, generator=torch.Generator().manual_seed(0))
    bias = drawn.attended(model.scale, "means").bias
    posterior = model.encode(**inputs)
    name = next(iter(limit))
    of_mean = merged_groups(posterior, model.scale, "means", **{name.removeprefix("merge_"): limit[name]})[
        1
    ].assignment
    for name, value in limit.items():
        setattr(model.config, name, value)
    made = model.train().encode(**inputs, generator=torch.Generator().manual_seed(0))
    assert (made.num_vectors < posterior.num_vectors).any()
    for row in range(3):
        for group in range(int(of_mean[row].max()) + 1):
            for draw in range(kappa):
                of_group = kappa * (of_mean[row] == group).nonzero()[:, 0] + draw
                weight = bias[row, of_group].softmax(0)
                torch.testing.assert_close(made.z[row, kappa * group + draw], weight @ drawn.z[row, of_group])


def test_training_draws_a_share_for_each_example():
    model = tiny_nvib(training_merge_share=0.25, merge_share=0.5).train()
    row = row_of(tiny_inputs("bart"), 0)  # of 9 tokens
    inputs = {name: value.expand(200, *value.shape[1:]) for name, value in row.items()}
    chance = torch.Generator().manual_seed(0)
    counts = model.encode(**inputs, generator=chance).num_vectors
    shares = 1 - 0.75 * torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(counts, (9 * shares).round())
    assert set(counts.tolist()) == set(range(2, 10))
    again = model.encode(**inputs, generator=torch.Generator().manual_seed(0)).num_vectors
    assert torch.equal(again, counts)
    loss = model(**tiny_inputs("bart"), labels=tiny_labels("bart")).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.nvib.parameters())
    assert set(model.encode(**inputs, merge_share=1.0).num_vectors.tolist()) == {9.0}  # the call's
    assert set(model.eval().encode(**inputs).num_vectors.tolist()) == {4.0}  # the evaluation's


@torch.no_grad()
def test_rows_are_merged_by_themselves():
    model, inputs, tokens = tiny_nvib(merge_share=0.4), tiny_inputs("bart"), decoder_inputs()
    together = model(**inputs, decoder_input_ids=tokens)
    for row in range(3):
        alone = model(**row_of(inputs, row), decoder_input_ids=tokens[row : row + 1])
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-3, rtol=0)
        assert together.num_vectors[row] == alone.num_vectors[0]
