"""Every method of PEFT that works on a base works on its wrap, and computes and trains the same there."""

import copy

import pytest
import torch
from tiny_models import tiny_base, tiny_inputs, tiny_labels

from nvib_hf import NvibForConditionalGeneration

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning"),  # of the base
    pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning"),  # PEFT hands the cache on by its old name
]
BASES = ["bart", "t5", "bert2gpt2"]
SEQ2SEQ = peft.TaskType.SEQ_2_SEQ_LM
TARGETS = {"bart": ["q_proj", "k_proj"], "t5": ["q", "k"], "bert2gpt2": ["c_attn", "query"]}
METHODS = {
    "lora": lambda f: peft.LoraConfig(task_type=SEQ2SEQ),
    "lora with targets": lambda f: peft.LoraConfig(target_modules=TARGETS[f]),
    "dora": lambda f: peft.LoraConfig(target_modules=TARGETS[f], use_dora=True),
    "modules to save": lambda f: peft.LoraConfig(target_modules=TARGETS[f], modules_to_save=["lm_head"]),
    "ia3": lambda f: peft.IA3Config(task_type=SEQ2SEQ),
    "adalora": lambda f: peft.AdaLoraConfig(task_type=SEQ2SEQ, total_step=10, tinit=1, tfinal=1),
    "loha": lambda f: peft.LoHaConfig(target_modules=TARGETS[f]),
    "lokr": lambda f: peft.LoKrConfig(target_modules=TARGETS[f]),
    "oft": lambda f: peft.OFTConfig(target_modules=TARGETS[f], oft_block_size=4),
    "layer norm": lambda f: peft.LNTuningConfig(task_type=SEQ2SEQ),
    "prompt": lambda f: peft.PromptTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=3),
    "prefix": lambda f: peft.PrefixTuningConfig(task_type=SEQ2SEQ, num_virtual_tokens=3),
    "p-tuning": lambda f: peft.PromptEncoderConfig(task_type=SEQ2SEQ, num_virtual_tokens=3, encoder_hidden_size=8),
}


def wrap(base):
    return NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(base)).eval()


def draw(model):
    """Weights of the adapter that are not the identity, alike in both models."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(trained(model).items()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def trained(model):
    """What an adapter trains, by the names that it has in the base."""
    return {name.replace("model.base.", "model.", 1): p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", BASES)
def test_what_works_on_the_base_works_on_the_wrap(family, method):
    base, inputs = tiny_base(family), tiny_inputs(family)
    batch = {**inputs, "labels": tiny_labels(family).masked_fill(tiny_labels(family) == -100, 5)}
    results = []
    for model in (base, wrap(base)):
        torch.manual_seed(0)
        try:
            adapted = peft.get_peft_model(copy.deepcopy(model), METHODS[method](family)).eval()
            draw(adapted)
            outputs = adapted(**batch)
            outputs.loss.backward()
        except Exception as error:
            results.append(error)
            continue
        results.append((outputs.logits.detach(), {n: p.grad for n, p in trained(adapted).items()}))
    of_base, of_wrap = results
    if isinstance(of_base, Exception):
        assert isinstance(of_wrap, Exception), of_base
        pytest.skip(f"the base refuses it: {type(of_base).__name__}: {str(of_base)[:60]}")
    if isinstance(of_wrap, Exception):
        raise of_wrap
    torch.testing.assert_close(of_wrap[0], of_base[0], atol=1e-3, rtol=1e-3)
    assert of_wrap[1].keys() == of_base[1].keys() and of_base[1]
    for name, gradient in of_base[1].items():
        assert (gradient is None) == (of_wrap[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                of_wrap[1][name], gradient, atol=1e-2, rtol=1e-2, msg=lambda t, n=name: f"{n}: {t}"
            )


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_tied_head_is_seen(family):
    """Tokens that are trained are trained in the head too, which is the embedding."""
    config = peft.LoraConfig(target_modules=TARGETS[family], trainable_token_indices={"shared": [50, 60]})
    batch = {**tiny_inputs(family), "labels": tiny_labels(family)}
    results = []
    for model in (tiny_base(family), wrap(tiny_base(family))):
        adapted = peft.get_peft_model(model, config).eval()
        heads = [name for name, module in adapted.named_modules() if type(module).__name__ == "TrainableTokensWrapper"]
        adapted(**batch).loss.backward()
        (gradient,) = [p.grad for n, p in adapted.named_parameters() if "trainable_tokens_delta" in n][:1]
        results.append((len(heads), gradient))
    assert results[0][0] == results[1][0] > 1
    assert results[0][1].abs().max() > 0
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_weight_tying_is_ensured(name, kind):
    """The same modules become PEFT's, in the base and in its wrap."""
    names = {"target_modules": ["q_proj"]}
    names[kind] = [*names.get(kind, []), name]
    found = []
    for model in (tiny_base("bart"), wrap(tiny_base("bart"))):
        adapted = peft.get_peft_model(model, peft.LoraConfig(**copy.deepcopy(names), ensure_weight_tying=True))
        modules = {n for n, m in adapted.named_modules() if type(m).__module__.startswith("peft.") and "proj" not in n}
        found.append((sorted(trained(adapted)), {n.replace("model.base", "model", 1) for n in modules}))
    assert found[0] == found[1] and any("lm_head" in n for n in found[1][1])


def test_adapters_are_merged_and_mixed():
    inputs = {**tiny_inputs("bart"), "decoder_input_ids": torch.tensor([[2, 7, 8]] * 3)}
    results = []
    for model in (tiny_base("bart"), wrap(tiny_base("bart"))):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]), mixed=True)
        draw(adapted)
        adapted.add_adapter("other", peft.LoHaConfig(target_modules=["k_proj"]))
        adapted.set_adapter(["default", "other"])
        draw(adapted)
        adapted.eval()
        mixed = adapted(**inputs).logits
        merged = adapted.merge_and_unload()
        assert type(merged) is type(model)
        torch.testing.assert_close(merged(**inputs).logits, mixed, atol=1e-4, rtol=1e-4)
        results.append(mixed)
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", BASES)
def test_sizes_are_read_through_the_configuration(family):
    base = tiny_base(family)
    model = wrap(base)
    config, of_base = model.config, base.config
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size", "d_model", "num_layers"):
        assert getattr(config, name, None) == getattr(of_base, name, None), name
        assert config.to_dict().get(name) == of_base.to_dict().get(name), name
        assert name not in config.to_diff_dict()
    assert type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_default_targets_are_those_of_the_base_that_is_adapted():
    """Two wraps of different bases, one after the other."""
    for family, targets in (("t5", {"q", "v"}), ("bart", {"q_proj", "v_proj"}), ("t5", {"q", "v"})):
        adapted = peft.get_peft_model(wrap(tiny_base(family)), peft.LoraConfig())
        assert adapted.peft_config["default"].target_modules == targets


@pytest.mark.parametrize(
    ("around", "message"),
    [
        (lambda base: peft.get_peft_model(base, peft.LoraConfig()), "has an adapter in it .*merge_and_unload"),
        (lambda base: peft.get_peft_model(base, peft.LoraConfig()).get_base_model(), "has an adapter in it"),
        (lambda base: torch._dynamo.OptimizedModule(base, lambda model: model), "is compiled .*_orig_mod"),
        (torch.nn.DataParallel, r"is a DataParallel\. Wrap the model in it, model\.module"),
        (lambda base: torch.nn.Linear(2, 2), "must be a model of Transformers, .* but got Linear"),
        (lambda base: 3, "must be a model of Transformers, .* but got int"),
        (lambda base: None, "must be a model of Transformers, .* but got NoneType"),
    ],
)
def test_what_is_around_a_base_is_refused_by_name(around, message):
    with pytest.raises((TypeError, ValueError), match=message):
        NvibForConditionalGeneration.from_base_pretrained(around(tiny_base("bart")))
