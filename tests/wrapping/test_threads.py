"""One model in many threads: each call has a pass of its own, whatever its self-attentions hand on."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import BERT_LIKE, tiny_base, tiny_inputs, tiny_labels
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

from nvib_hf import NvibForConditionalGeneration, NvibForSequenceClassification, NvibForTokenClassification

AT_WORK = {"tau_alpha": 1.0, "tau_sigma": 0.5}
SETTINGS = {
    "everywhere": {"attentions": ["cross", "encoder", "decoder"]},
    "dropping": {"attentions": ["cross", "encoder"], "alpha_threshold": 0.1},
    "adding up": {"attentions": ["cross", "encoder"], "accumulate_alpha": True},
    "both": {"attentions": ["cross", "encoder"], "accumulate_alpha": True, "alpha_threshold": 0.1},
}
CALLS = {
    "forward": lambda model, seed: model(**inputs(seed), labels=tiny_labels("bart", seed=seed)).logits,
    "encode": lambda model, seed: model.encode(**inputs(seed)).pooled(),
    "generate": lambda model, seed: model.generate(**inputs(seed), num_beams=2, max_new_tokens=4, min_new_tokens=4),
    "a draw": lambda model, seed: (
        model.encode(**inputs(seed), sample=True, generator=torch.Generator().manual_seed(seed)).z
    ),
}


def inputs(seed: int) -> dict:
    """Of another length for every seed, so that what belongs to another call does not even fit."""
    given = tiny_inputs("bart", seed=seed)
    return {name: value[:, : 9 - seed % 3] for name, value in given.items()}


def in_threads(call, model, threads: int) -> list:
    def no_grad(seed):  # which is of each thread
        with torch.no_grad():
            return call(model, seed)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(no_grad, range(2 * threads)))


@pytest.mark.parametrize("threads", [4, 16])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_threads_do_not_see_each_other(settings, call, threads):
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), **AT_WORK, **settings)
    expected = [call(model, seed) for seed in range(2 * threads)]
    for result, alone in zip(in_threads(call, model, threads), expected, strict=True):
        torch.testing.assert_close(result, alone)


@pytest.mark.parametrize("threads", [4, 16])
@pytest.mark.parametrize("kind", ["sequence", "token"])
@torch.no_grad()
def test_classifiers(kind, threads):
    wrapping, base = {
        "sequence": (NvibForSequenceClassification, BertForSequenceClassification),
        "token": (NvibForTokenClassification, BertForTokenClassification),
    }[kind]
    settings = {"accumulate_alpha": True, "alpha_threshold": 0.1}
    model = wrapping.from_base_pretrained(base(BertConfig(**BERT_LIKE)).eval(), **AT_WORK, **settings)

    def call(model, seed):
        outputs = model(**inputs(seed))
        return torch.cat([outputs.logits.flatten(), outputs.kl_gaussian, outputs.layer_prop_vectors["encoder.1"]])

    expected = [call(model, seed) for seed in range(2 * threads)]
    for result, alone in zip(in_threads(call, model, threads), expected, strict=True):
        torch.testing.assert_close(result, alone)


def first_scores(model, seed: int, **more) -> torch.Tensor:
    """The scores of the first token, by a limit of merging that depends on the seed."""
    limit = [{}, {"merge_share": 0.4}, {"merge_cost": 1e9}][seed % 3]
    how = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True, "do_sample": False}
    return model.generate(**inputs(seed), **limit, **how, **more).scores[0]


@torch.no_grad()
def test_limits_of_merging_in_threads():
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart")).eval()
    expected = [first_scores(model, seed) for seed in range(12)]
    for found, alone in zip(in_threads(first_scores, model, 6), expected, strict=True):
        torch.testing.assert_close(found, alone)
    assert not torch.allclose(expected[0], first_scores(model, 0, merge_cost=1e9))


@torch.no_grad()
def test_a_call_inside_another_has_its_own_limit():
    """As an assistant's, or that of a processor of scores."""
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart")).eval()
    expected, found = [first_scores(model, seed) for seed in range(3)], []

    def within(tokens, scores):
        found.extend(first_scores(model, seed) for seed in range(3))
        return scores

    for seed in range(3):
        first_scores(model, seed, logits_processor=[within])
    for i, scores in enumerate(found):
        torch.testing.assert_close(scores, expected[i % 3])
    assert len(found) == 9
