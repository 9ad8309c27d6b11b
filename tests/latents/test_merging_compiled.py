"""Merging under ``torch.compile``, in exported graphs, and what it makes of NaN."""

import pytest
import torch
from tiny_models import tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib

LIMITS = [{"merge_share": 0.5}, {"merge_cost": 1e9}, {}]


def test_compiling_says_what_merging_needs():
    """Without merging a step is one graph; with it, as many as it takes, or a reason."""
    inputs, labels = tiny_inputs("bart"), tiny_labels("bart")
    model = tiny_nvib().train()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    assert whole(**inputs, labels=labels).loss.isfinite()
    model.config.merge_share = 0.5
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Compile with fullgraph=False, or set merge_share=1, merge_cost=0"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs, labels=labels)
    torch._dynamo.reset()
    in_parts = torch.compile(model, backend="eager")
    losses = []
    for step in (in_parts, model):
        torch.manual_seed(0)
        losses.append(step(**inputs, labels=labels).loss)
    torch.testing.assert_close(*losses)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
def test_a_limit_of_a_call_holds_in_what_is_compiled(own):
    """Of ``encode`` itself, or of a function that calls it."""
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    torch._dynamo.reset()
    compiled = torch.compile((lambda **given: model.encode(**given)) if own else model.encode, backend="eager")
    counts = []
    for limit in LIMITS * 2:
        latents = compiled(**inputs, **limit)
        torch.testing.assert_close(latents.z, model.encode(**inputs, **limit).z)
        counts.append(latents.num_vectors.tolist())
    assert counts[0] < counts[2] and counts[1] == [1, 1, 1] and counts[:3] == counts[3:]
    torch._dynamo.reset()


@torch.no_grad()
def test_a_limit_of_generation_holds_in_what_is_compiled():
    model, inputs = tiny_nvib(), tiny_inputs("bart")
    settings = {"max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    torch._dynamo.reset()
    compiled = torch.compile(lambda **given: model.generate(**given, **settings).scores[0], backend="eager")
    scores = []
    for limit in LIMITS:
        scores.append(compiled(**inputs, **limit))
        torch.testing.assert_close(scores[-1], model.generate(**inputs, **limit, **settings).scores[0])
    assert not torch.allclose(scores[0], scores[2]) and not torch.allclose(scores[1], scores[2])
    torch._dynamo.reset()


@pytest.mark.parametrize("limit", LIMITS[:2], ids=str)
def test_a_limit_of_a_call_is_refused_in_a_graph(limit):
    model, inputs = tiny_nvib(), tiny_inputs("bart")

    class Encoder(torch.nn.Module):
        def forward(self, input_ids):
            return model.encode(input_ids=input_ids, **limit).z

    with torch.no_grad(), pytest.raises(ValueError, match=r"which no graph can\. Export with"):
        torch.export.export(Encoder().eval(), (inputs["input_ids"],), strict=False)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"alpha_threshold": 1e-3}, {"dropping": "relaxed"}], ids=str)
@pytest.mark.parametrize("limit", LIMITS, ids=str)
@pytest.mark.parametrize("where", [1, slice(None)], ids=["a vector", "a row"])
def test_nan_is_seen(settings, limit, where):
    """Neither dropping nor merging leaves out what is NaN: a text of it has no latent, others have theirs."""
    model, ids = tiny_nvib(**settings), tiny_inputs("bart")["input_ids"]
    embeds = model.base.get_input_embeddings()(ids)
    expected = model.encode(inputs_embeds=embeds, **limit)
    embeds[1, where] = torch.nan
    latents = model.encode(inputs_embeds=embeds, **limit)
    assert latents.log_pi[1].isnan().all()
    for row in (0, 2):
        torch.testing.assert_close(latents[row].compact().z, expected[row].compact().z)
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        model.generate(inputs_embeds=embeds, do_sample=True, max_new_tokens=2, **limit)
