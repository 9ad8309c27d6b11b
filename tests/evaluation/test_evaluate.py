"""Measures of reconstruction, rate and latents against loops over single texts, closed forms and brute force."""

import functools
import json
import math
import sys

import pytest
import sacrebleu
import torch
from tiny_models import tiny_base
from tiny_nvib import tiny_nvib
from tiny_text import tiny_tokenizer
from torch.distributions import Dirichlet, Normal, kl_divergence

from nvib_hf import NvibLatents, add_to_model_card, evaluate, evaluation_section
from nvib_hf.evaluation import rate_distortion as likelihood
from nvib_hf.evaluation.rate_distortion import (
    dirichlet_log_density,
    draw_and_log_ratio,
    log_importance_weights,
    mutual_information,
    rate_distortion,
)
from nvib_hf.evaluation.texts import (
    as_read,
    evaluating,
    kept_by_frequency,
    kept_by_length,
    kept_by_position,
    kept_tokens,
    labels_of,
    negative_log_likelihood,
    reconstruct,
    reconstruction_scores,
    target_ids,
)

TEXTS = ["w5 w6 w7", "w8", "w9 w10 w11 w12 w13 w14", "w5 w5 w90", "w20 w21", "w5 w40 w41 w42"]
TOKENIZER = tiny_tokenizer()
THRESHOLD = 830.0  # some of the tiny model's pseudo-counts are below it


def encode(model, text: str, **options) -> NvibLatents:
    return model.encode(torch.tensor([TOKENIZER(text).input_ids]), **options)


def labels(text: str) -> torch.Tensor:
    return torch.tensor([TOKENIZER(text).input_ids])


# ------------------------------------------------------------------------------------------ reconstruction
@pytest.mark.parametrize("make", [tiny_nvib, functools.partial(tiny_base, "bart")], ids=["nvib", "plain"])
def test_reconstructions_are_those_of_single_texts_in_order(make):
    model = make()
    expected = []
    for text in TEXTS:
        ids = model.eval().generate(torch.tensor([TOKENIZER(text).input_ids]), max_new_tokens=6)
        expected.append(TOKENIZER.decode(ids[0], skip_special_tokens=True))
    model.train()
    assert reconstruct(model, TOKENIZER, TEXTS, batch_size=4, max_new_tokens=6) == expected
    assert len(set(expected)) > 1


def test_the_mode_of_every_module_comes_back():
    model = tiny_nvib().train()
    model.base.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        raise RuntimeError
    assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()


def test_as_read_cuts_and_leaves_out_unknown_words():
    assert as_read(TOKENIZER, ["w5  unknown w7", "w5 w6 w7"], max_length=3) == ["w5", "w5 w6"]


def test_scores_of_reconstruction():
    predictions, references = ["a b c d e", "a x c d", "d"], ["a b c d e", "a b c d", "d e"]
    scores = reconstruction_scores(predictions, references)
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["token_error"] == pytest.approx(2 / 11)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score)
    with pytest.raises(ValueError, match="3 predictions, but 2 references"):
        reconstruction_scores(predictions, references[:2])


def test_what_to_install_for_bleu(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match=r"pip install 'nvib-hf\[evaluation\]'"):
        reconstruction_scores(["a"], ["a"])


def test_a_leading_start_token_is_no_target():
    model = tiny_nvib()
    tokenizer = tiny_tokenizer()
    assert labels_of(model, tokenizer, ["w5 w6", "w7"], 64).tolist() == [[5, 6, 1], [7, 1, -100]]
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 1)]
    )
    assert labels_of(model, tokenizer, ["w5 w6", "w7"], 64).tolist() == [[5, 6, 1], [7, 1, -100]]


# -------------------------------------------------------------------------------------- rate and distortion
def normal_divergences(latents, prior: Normal) -> torch.Tensor:
    """Nats of each vector of one text's posterior, ``(Nl,)``."""
    return kl_divergence(Normal(latents.z[0], (0.5 * latents.logvar[0]).exp()), prior).sum(-1).double()


@pytest.mark.parametrize("kl_weights", ["drawn", "pseudo_counts"])
@torch.no_grad()
def test_rate_and_distortion_against_single_texts(kl_weights):
    """The KLs by torch.distributions, whatever the model is trained with: the Gaussians that are drawn, n' Gaussians
    drawn from the mixture as published, and two symmetric Dirichlets."""
    model = tiny_nvib(delta=0.5, prior_mu=0.2, prior_var=1.5, prior_alpha=2.0, kl_weights=kl_weights)
    nll = drawn = published = dirichlet = tokens = reported = 0.0
    for text in TEXTS:
        output = model(torch.tensor([TOKENIZER(text).input_ids]), labels=labels(text))
        latents, n = output.latents, output.latents.z.shape[1]
        alpha = latents.log_alpha[0].exp().double()
        prior_total, ones = 2.0 + 0.5 * (n - 1), torch.ones(n, dtype=torch.double)
        divergence = normal_divergences(latents, Normal(torch.tensor(0.2), math.sqrt(1.5)))
        drawn += divergence.sum()
        published += n * (alpha / alpha.sum() * divergence).sum()
        dirichlet += kl_divergence(Dirichlet(alpha.sum() / n * ones), Dirichlet(prior_total / n * ones))
        nll += output.cross_entropy * labels(text).numel()
        reported += output.kl_gaussian[0] * labels(text).numel()
        tokens += labels(text).numel()
    results = rate_distortion(model.train(), TOKENIZER, TEXTS, batch_size=4)
    assert abs(published - drawn) > 0.1 * drawn
    expected = {
        "cross_entropy": nll / tokens,
        "kl_gaussian": reported / tokens,
        "kl_gaussian_per_token": drawn / tokens,
        "kl_gaussian_published_per_token": published / tokens,
        "kl_dirichlet_per_token": dirichlet / tokens,
        "rate": (drawn + dirichlet) / len(TEXTS),
        "rate_published": (published + dirichlet) / len(TEXTS),
        "elbo": -results["cross_entropy_sampled"] - (drawn + dirichlet) / tokens,
    }
    for name, value in expected.items():
        assert results[name] == pytest.approx(value.item(), rel=1e-4), name
    assert results["prop_vectors"] == 1 and results["num_vectors"] == pytest.approx(tokens / len(TEXTS))
    assert model.training


@torch.no_grad()
def test_only_vectors_that_are_kept_have_a_rate():
    model = tiny_nvib(alpha_threshold=THRESHOLD)
    drawn = of_all = published = tokens = 0.0
    for text in TEXTS:
        latents = encode(model, text)
        keep = latents.log_alpha[0] > math.log(THRESHOLD)
        keep[0] = True  # the prior's component, whose divergence is 0
        alpha, divergence = latents.log_alpha[0].exp().double(), normal_divergences(latents, Normal(0.0, 1.0))
        drawn, of_all = drawn + divergence[keep].sum(), of_all + divergence.sum()
        published += len(alpha) * (alpha / alpha.sum() * divergence).sum()
        tokens += labels(text).numel()
    results = rate_distortion(model, TOKENIZER, TEXTS, batch_size=4)
    assert 0 < drawn < 0.9 * of_all
    assert results["kl_gaussian_per_token"] == pytest.approx(drawn.item() / tokens, rel=1e-4)
    assert results["kl_gaussian_published_per_token"] == pytest.approx(published.item() / tokens, rel=1e-4)


def test_active_units_are_the_channels_that_vary():
    model = tiny_nvib()
    width = model.nvib.size_out
    with torch.no_grad():
        model.nvib.mu_logvar.weight[: width // 4] = 0  # a quarter of the means are the same for all texts
    assert rate_distortion(model, TOKENIZER, TEXTS)["active_units"] == 0.75


def test_a_bottleneck_that_reports_less(monkeypatch):
    """Points without pseudo-counts, variances and Dirichlet: what can be measured is measured."""
    model = tiny_nvib()
    kept = ("z", "log_pi", "attention_mask", "kl_gaussian")
    whole = NvibLatents.of
    monkeypatch.setattr(NvibLatents, "of", lambda *given: NvibLatents(**{name: whole(*given)[name] for name in kept}))
    results = rate_distortion(model, TOKENIZER, TEXTS, importance_samples=2)
    assert set(results) == {
        "cross_entropy",
        "cross_entropy_sampled",
        "kl_gaussian",
        "kl_gaussian_per_token",
        "active_units",
        "mutual_information",
    }
    assert kept_tokens(model, TOKENIZER, TEXTS) == []


def test_a_plain_model_has_a_cross_entropy():
    model = tiny_base("bart").eval()
    results = rate_distortion(model, TOKENIZER, TEXTS, batch_size=4)
    losses = [model(labels(text), labels=labels(text)).loss.item() * labels(text).numel() for text in TEXTS]
    expected = sum(losses) / sum(labels(text).numel() for text in TEXTS)
    assert results == {"cross_entropy": pytest.approx(expected, rel=1e-5)}


# ------------------------------------------------------------------------------- importance-weighted likelihood
def test_dirichlet_log_density():
    log_alpha, log_pi = torch.randn(4, 5).double(), torch.randn(4, 5).double().log_softmax(-1)
    expected = Dirichlet(log_alpha.exp()).log_prob(log_pi.exp())
    everything = torch.ones(4, 5, dtype=torch.bool)
    torch.testing.assert_close(dirichlet_log_density(log_pi, log_alpha, everything), expected)
    padded = [torch.cat([x, torch.full((4, 2), 3.0)], dim=1) for x in (log_pi, log_alpha)]
    mask = torch.cat([everything, ~everything[:, :2]], dim=1)
    torch.testing.assert_close(dirichlet_log_density(*padded, mask), expected)


@torch.no_grad()
def test_the_ratio_of_draws_is_that_of_densities():
    """-E[log p / q] is the sum of the divergences, in closed form; pseudo-counts on both sides of 1."""
    model = tiny_nvib(delta=0.5)
    latents = encode(model, "w5 w6 w7")
    latents["log_alpha"][0, 1:] = torch.tensor([1.0, 3.0, -0.5, 0.2])
    n, count = latents.z.shape[1], 4000
    _, log_ratio = draw_and_log_ratio(model.nvib, latents[[0] * count], torch.Generator().manual_seed(0))
    sigma = (0.5 * latents.logvar[0].double()).exp()
    gaussian = kl_divergence(Normal(latents.z[0].double(), sigma), Normal(torch.zeros(()).double(), 1.0)).sum()
    prior = Dirichlet(torch.full((n,), (1 + 0.5 * (n - 1)) / n).double())
    expected = gaussian + kl_divergence(Dirichlet(latents.log_alpha[0].double().exp()), prior)
    error = log_ratio.std() / count**0.5
    assert abs(-log_ratio.mean() - expected) < 4 * error < 0.03 * expected


@torch.no_grad()
def test_padding_and_dropped_vectors_are_no_part_of_the_draw():
    model = tiny_nvib(alpha_threshold=THRESHOLD)
    padded = model.encode(**TOKENIZER(TEXTS, padding=True, return_tensors="pt"))
    assert 0 < padded.prop_vectors.mean() < 1
    for row in range(len(TEXTS)):
        compact = padded[row].compact()
        ratios = [
            draw_and_log_ratio(model.nvib, latents[[0] * 3000], torch.Generator().manual_seed(0))[1]
            for latents in (padded[row], compact)
        ]
        error = ratios[0].std() / 3000**0.5
        assert abs(ratios[0].mean() - ratios[1].mean()) <= 6 * error + 1e-9  # both are 0 where nothing is kept
    draw, _ = draw_and_log_ratio(model.nvib, padded, torch.Generator().manual_seed(0))
    assert torch.equal(draw.log_pi > -math.inf, padded.log_pi > -math.inf)
    torch.testing.assert_close(draw.log_pi.exp().sum(-1), torch.ones(len(TEXTS)))


@torch.no_grad()
def test_likelihood_against_brute_force():
    """The mean of p(x | w) over the model's own draws from the prior, where the posterior is near to it."""
    model = tiny_nvib(prior_alpha=8.0)
    model.get_output_embeddings().weight.mul_(0.2)  # less peaked: else few draws make up the mean
    text, count = "w5 w6", 2000
    latents = encode(model, text, sample=False)
    spread = {"z": 0.03 * latents.z, "logvar": torch.full_like(latents.logvar, -0.02)}
    latents = NvibLatents(**{**latents, **spread, "log_alpha": torch.tensor([[1.3, 0.8, 1.1, 0.9]])})
    rows = labels(text).expand(count, -1)
    n = latents.z.shape[1]
    drawn = model.sample_latents(count, n, generator=torch.Generator().manual_seed(0))
    nll = negative_log_likelihood(model, rows, encoder_outputs=drawn)
    brute_force = (-nll).logsumexp(0) - math.log(count)
    assert 0.1 < nll.std() < 1  # the latent matters, and no single draw makes up the mean
    weights = log_importance_weights(model, latents[[0] * 200], rows[:200], 10, torch.Generator().manual_seed(1))
    weights = weights.flatten()
    estimate = weights.logsumexp(0) - math.log(len(weights))
    assert estimate.item() == pytest.approx(brute_force.item(), abs=0.1)
    assert weights.mean() < estimate  # one draw alone is a looser bound

    bounds = [(weights.reshape(k, -1).logsumexp(0) - math.log(k)).mean().item() for k in (1, 5, 50)]
    assert bounds == sorted(bounds) and bounds[-1] < estimate + 1e-6


def test_the_bound_tightens_with_the_number_of_draws():
    model = tiny_nvib(delta=0.5, tau_sigma=0.9)
    results = {k: rate_distortion(model, TOKENIZER, TEXTS * 5, importance_samples=k) for k in (1, 20)}
    assert results[1]["iw_log_likelihood"] == pytest.approx(results[1]["iw_elbo"])
    assert results[20]["iw_log_likelihood"] > results[20]["iw_elbo"] + 0.1
    assert results[20]["iw_elbo"] == pytest.approx(results[1]["iw_elbo"], rel=0.1)


@torch.no_grad()
def test_no_likelihood_without_a_density():
    model, generator = tiny_nvib(), torch.Generator()
    latents = encode(model, "w5 w6")
    sharp = NvibLatents(**{**latents, "log_alpha": latents.log_alpha + 60})
    points = NvibLatents(z=latents.z, log_pi=latents.log_pi, attention_mask=latents.attention_mask)
    for without in (sharp, points):
        assert log_importance_weights(model, without, labels("w5 w6"), 2, generator) is None


# ----------------------------------------------------------------------------------------- mutual information
@pytest.mark.parametrize(
    ("own", "expected"), [(0.0, 0.0), (1.0, math.log(4 * math.e / (math.e + 3))), (99.0, math.log(4))]
)
def test_mutual_information_of_a_known_critic(monkeypatch, own, expected):
    """Own latents score ``own`` nats higher than those of others; at most log N, here log 4."""
    model = tiny_nvib()
    of_text = {}

    def nll(model, labels, encoder_outputs):
        if not of_text:  # each group starts with the texts' own latents
            of_text.update({tuple(row.tolist()): z for row, z in zip(labels, encoder_outputs.z, strict=True)})
        same = [torch.equal(of_text[tuple(row.tolist())], z) for row, z in zip(labels, encoder_outputs.z, strict=True)]
        return 7.0 - own * torch.tensor(same).float()

    monkeypatch.setattr(likelihood, "negative_log_likelihood", nll)
    assert mutual_information(model, TOKENIZER, TEXTS, group_size=4) == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------ tokens kept
@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_kept_tokens_are_those_of_single_texts(side):
    model, tokenizer = tiny_nvib(alpha_threshold=THRESHOLD), tiny_tokenizer()
    tokenizer.padding_side = side
    model.get_encoder().embed_positions.weight.zero_()  # BART's positions count padding
    records = kept_tokens(model, tokenizer, TEXTS, batch_size=4)
    assert [r["text"] for r in records] == [i for i, text in enumerate(TEXTS) for _ in range(len(text.split()) + 1)]
    for i, text in enumerate(TEXTS):
        own, latents = [r for r in records if r["text"] == i], encode(model, text)
        assert [r["token"] for r in own] == [*text.split(), "</s>"]
        assert [r["kept"] for r in own] == (latents.log_alpha[0, 1:] > math.log(THRESHOLD)).tolist()
        torch.testing.assert_close(torch.tensor([r["log_alpha"] for r in own]), latents.log_alpha[0, 1:])
        assert [r["special"] for r in own] == [False] * len(text.split()) + [True]
        assert own[0]["relative_position"] == 0 and own[-1]["relative_position"] == 1
    assert {r["frequency"] for r in records if r["token"] == "w5"} == {4}
    assert {r["kept"] for r in records} == {True, False}


def test_summaries_of_kept_tokens():
    def record(length, position, frequency, kept, special=False):
        relative = position / (length - 1)
        given = {"length": length, "relative_position": relative, "frequency": frequency, "kept": kept}
        return {**given, "special": special, "log_alpha": 1}

    records = [record(4, 0, 1, True), record(4, 1, 2, False), record(4, 2, 3, False), record(4, 3, 9, True, True)]
    records += [record(5, i, 4, i == 4) for i in range(5)]
    shares = lambda groups: {group["group"]: group["kept"] for group in groups}  # noqa: E731
    assert shares(kept_by_length(records)) == {"1-4": 0.5, "5-8": 0.2}
    assert shares(kept_by_position(records)) == {
        "first third": 1 / 3,
        "middle third": 0,
        "last third": pytest.approx(1 / 3),
    }
    assert shares(kept_by_frequency(records)) == {"rarest quarter": pytest.approx(1 / 3), "second quarter": 0.2}
    assert kept_by_length([]) == kept_by_position([]) == kept_by_frequency([]) == []


# -------------------------------------------------------------------------------------------------- all of it
def test_evaluate_is_for_json_and_follows_its_seed():
    model = tiny_nvib(alpha_threshold=THRESHOLD).train()
    options = {"num_samples": 4, "num_pairs": 2, "importance_samples": 2, "max_length": 8, "training_texts": TEXTS[:2]}
    state = torch.get_rng_state()
    results = evaluate(model, TOKENIZER, TEXTS, **options)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert set(results) == {"settings", "reconstruction", "rate_distortion", "kept", "samples", "interpolation"}
    assert set(results["samples"]) == {"greedy", "beam", "nucleus", "real"}
    assert set(results["interpolation"]) == {"transport", "mixture"}
    torch.manual_seed(5)
    assert evaluate(model, TOKENIZER, TEXTS, **options) == results
    assert evaluate(model, TOKENIZER, TEXTS, **options, seed=1)["samples"] != results["samples"]
    fewer = {"decodings": {"hot": {"do_sample": True, "temperature": 9.0}}, "methods": ["mixture"]}
    chosen = evaluate(model, TOKENIZER, TEXTS, **options, **fewer)
    assert set(chosen["samples"]) == {"hot", "real"} and "reverse_perplexity" not in chosen["samples"]["real"]
    assert chosen["samples"]["hot"] != results["samples"]["nucleus"]
    assert chosen["interpolation"] == {"mixture": results["interpolation"]["mixture"]}
    assert set(evaluate(tiny_base("bart"), TOKENIZER, TEXTS, max_length=8)) == {
        "settings",
        "reconstruction",
        "rate_distortion",
    }


def test_what_to_install_for_interpolations_is_said_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    quick = {"num_samples": 0, "importance_samples": 0, "max_length": 8}
    model = tiny_nvib()
    assert "interpolation" not in evaluate(model, TOKENIZER, TEXTS, num_pairs=0, **quick)
    side_by_side = evaluate(model, TOKENIZER, TEXTS, num_pairs=1, methods=["mixture"], **quick)
    assert set(side_by_side["interpolation"]) == {"mixture"}
    monkeypatch.setattr(model, "generate", None)
    with pytest.raises(ImportError, match=r"pip install 'nvib-hf\[interpolation\]'"):
        evaluate(model, TOKENIZER, TEXTS, num_pairs=1, **quick)


def test_bad_texts_are_refused():
    for texts in ("w5 w6", []):
        with pytest.raises(ValueError, match="texts must be a list"):
            evaluate(tiny_nvib(), TOKENIZER, texts)


SAMPLES = {
    "greedy": {"num_samples": 3, "fluency": 80.0, "fluency_ratio": 2.0, "examples": ["a | b", "## c\n`d`", ""]},
    "nucleus": {"num_samples": 3, "fluency": 120.0, "fluency_ratio": 3.0, "self_bleu": 9.5},
    "real": {"fluency": 40.0, "self_bleu": 8.25},
}
PATHS = {
    "transport": {"word_edits": 1.5, "fluency": [50.0, None], "example": ["the one", "the other"]},
    "mixture": {"word_edits": 2.25, "fluency": [60.0, 70.0], "example": ["this", "that"]},
}
RESULTS = {
    "settings": {"texts": 7, "seed": 0},
    "reconstruction": {"exact_match": 0.5, "bleu": 61.25, "token_error": 0.125},
    "rate_distortion": {"cross_entropy": 0.25, "rate": 79.04, "rate_published": 12.0, "elbo": None},
    "kept": {"by_length": [{"group": "1-4", "tokens": 9, "kept": 0.4, "log_alpha": -1.5}], "by_position": []},
    "samples": SAMPLES,
    "interpolation": PATHS,
}


def test_the_section_of_results():
    section = evaluation_section(RESULTS)
    for line in (
        "Over 7 held-out texts (greedy decoding, seed 0):",
        "| exact reconstructions | 50.0% |",
        "| rate: what a latent costs, nats per text | 79.0 |",
        "| the same, by the published KL | 12.0 |",
        "| ELBO, nats per token | – |",
        "| samples from the prior | greedy | nucleus | real texts |",
        "| perplexity under a language model | 80.0 | 120.0 | 40.0 |",
        "| by that of real texts | 2.00 | 3.00 |  |",
        "| self-BLEU |  | 9.5 | 8.2 |",
        "| 1-4 | 40.0% | -1.50 | 9 |",
        "| interpolations | transport | mixture |",
        "| words edited between neighbours | 1.50 | 2.25 |",
        "| weight | transport | perplexity, transport | mixture | perplexity, mixture |",
        "| 1.00 | the other | – | that | 70.0 |",
        "Samples from the prior, greedy:",
        r"- a \| b",
        r"- \#\# c \`d\`",
        "- *(nothing)*",
    ):
        assert line in section.splitlines(), line
    assert "Samples from the prior, real" not in section


def test_the_section_of_a_plain_model():
    section = evaluation_section({"settings": {"texts": 7, "seed": 0}, "reconstruction": {"bleu": 61.25}})
    assert section.splitlines()[-1] == "| reconstruction BLEU | 61.2 |" and "prior" not in section


@pytest.mark.parametrize("pad", [0, 1])
def test_a_target_whose_start_is_its_last_token(pad):
    """mBART starts with the last token of a target that is no padding: none is left out at its beginning."""
    model, tokenizer = tiny_nvib("mbart"), tiny_tokenizer()
    model.config.pad_token_id = pad
    texts = ["w5 w6", ""]
    assert target_ids(model, tokenizer, texts, 12) == tokenizer(text_target=texts).input_ids


def test_results_in_the_model_card(tmp_path):
    with pytest.raises(FileNotFoundError, match="writes a card"):
        add_to_model_card(tmp_path, RESULTS)
    tiny_nvib().save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    before = card.read_text(encoding="utf-8")
    add_to_model_card(tmp_path, RESULTS)
    first = card.read_text(encoding="utf-8")
    assert before.index("## Settings") < first.index("## Evaluation") < first.index("## Citation")
    add_to_model_card(tmp_path, {**RESULTS, "settings": {"texts": 8, "seed": 0}})
    second = card.read_text(encoding="utf-8")
    assert second == first.replace("Over 7 held-out", "Over 8 held-out")
    card.write_text("# Mine\n", encoding="utf-8")
    add_to_model_card(tmp_path, RESULTS)
    assert card.read_text(encoding="utf-8").startswith("# Mine\n\n<!-- ")
