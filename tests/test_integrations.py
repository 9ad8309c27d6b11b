"""Under the tools that users put around a model: PEFT, torch.compile, half precision, loading, checkpointing."""

import contextlib
import json

import pytest
import torch
from tiny_models import checkpoint_layers, tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import cross_attention, tensors, tiny_nvib
from torch import nn

from nvib_hf import NvibForConditionalGeneration

# PEFT asks transformers for a name that is to go, and so does a test here: nothing of this package's.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FAMILIES = ["bart", "t5", "bert2gpt2"]
ALL_FAMILIES = ["bart", "t5", "bert2bert", "bert2gpt2"]
LENGTH = {"min_new_tokens": 5, "max_new_tokens": 5}


def forward(model, family, **settings):
    return model(**tiny_inputs(family), labels=tiny_labels(family), **settings)


def evaluate(model, family):
    with torch.no_grad():
        return forward(model.eval(), family)


def generate(model, family, **settings):
    torch.manual_seed(0)
    return model.generate(**tiny_inputs(family), **LENGTH, **settings)


# --------------------------------------------------------------------------------------------------------------- PEFT
peft = pytest.importorskip("peft")
# Attention of encoder and decoder; the cross-attention's keys and values are among them.
TARGETS = {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "t5": ["q", "k", "v", "o"],
    "bert2bert": ["query", "key", "value"],
    "bert2gpt2": ["query", "key", "value", "c_attn", "q_attn"],
}
CROSS_KEYS_AND_VALUES = {
    "bart": r".*encoder_attn\.(k|v)_proj",
    "t5": r".*EncDecAttention\.(k|v)",
    "bert2bert": r".*crossattention\.self\.(key|value)",
    "bert2gpt2": r".*crossattention\.c_attn",
}


def adapted(family, kind="lora", targets=None, evaluation="means", **settings):
    """A model with an adapter whose weights are not those that change nothing."""
    targets = targets or TARGETS[family]
    common = {"target_modules": targets, "modules_to_save": ["nvib"], "task_type": "SEQ_2_SEQ_LM", **settings}
    if kind == "lora":
        config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, **common)
    else:
        config = peft.IA3Config(feedforward_modules=[], **common)
    model = peft.get_peft_model(tiny_nvib(family, evaluation=evaluation), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "ia3_l" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_peft_trains_saves_loads_and_merges(family, kind, tmp_path):
    model = adapted(family, kind)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "ia3_" in name or "nvib.modules_to_save" in name for name in trained)
    assert not any("nvib.original_module" in name for name in trained)
    model.base_model.config.lambda_gaussian = model.base_model.config.lambda_dirichlet = 0.1
    before = {name: value.detach().clone() for name, value in tensors(model).items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    forward(model.train(), family).loss.backward()
    optimiser.step()
    moved = {name for name, value in tensors(model).items() if not torch.equal(value, before[name])}
    assert moved == trained

    expected, tokens = evaluate(model, family), generate(model, family, num_beams=2)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_nvib(family), tmp_path).eval()
    assert torch.equal(evaluate(loaded, family).logits, expected.logits)
    assert torch.equal(evaluate(loaded, family).kl_gaussian, expected.kl_gaussian)
    assert torch.equal(generate(loaded, family, num_beams=2), tokens)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["modules_to_save"] == ["nvib"]

    if kind == "ia3":  # PEFT unloads modules_to_save that have no weight of their own for LoRA alone
        loaded.merge_adapter()
        torch.testing.assert_close(evaluate(loaded, family).logits, expected.logits, rtol=1e-4, atol=1e-4)
        return
    merged = loaded.merge_and_unload()
    assert type(merged) is NvibForConditionalGeneration
    torch.testing.assert_close(evaluate(merged, family).logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(**tiny_inputs(family), **LENGTH, num_beams=2), tokens)
    merged.save_pretrained(tmp_path / "merged")
    again = NvibForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(evaluate(again, family).logits, evaluate(merged, family).logits)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("exact", [False, True], ids=["published", "exact"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_adapters_of_the_cross_attention_count_wherever_its_projections_do(family, exact, kind):
    """Keys, values and both matrices of the evaluation form, as if the adapter were merged.

    Reading ``.weight`` would take the matrices without the adapter: shown below not to be the same.
    """
    model = adapted(family, kind, CROSS_KEYS_AND_VALUES[family], "mixture", modules_to_save=None)
    for module in cross_attention(model):
        module.nvib_exact = exact
    expected = evaluate(model, family).logits
    with model.disable_adapter():
        assert (evaluate(model, family).logits - expected).abs().max() > 0.05

    shortcut = bypassing(model)
    with shortcut:
        assert (evaluate(model, family).logits - expected).abs().max() > 1e-3
    merged = model.merge_and_unload()
    torch.testing.assert_close(evaluate(merged, family).logits, expected, rtol=1e-4, atol=1e-4)


@contextlib.contextmanager
def bypassing(model):
    """The shortcut that must not be taken: matrices from the projections' own weights."""
    from nvib_hf.wrapping import cross_attention as module

    original = module.projection_matrix

    def shortcut(projection, like):
        weight = projection.weight
        return weight if weight.shape[1] == like.shape[-1] and "Conv1D" not in repr(projection) else weight.T

    module.projection_matrix = shortcut
    try:
        yield
    finally:
        module.projection_matrix = original


def test_peft_reaches_the_model_s_own_methods():
    model = adapted("bart")
    latents = model.encode(**tiny_inputs("bart"))
    torch.testing.assert_close(latents.kl_gaussian, evaluate(model, "bart").kl_gaussian)
    tokens = model.generate(encoder_outputs=latents, **LENGTH)
    assert torch.equal(tokens, generate(model, "bart"))
    drawn = model.sample_latents(2, 3)
    assert model.generate(encoder_outputs=drawn, **LENGTH).shape == (2, 6)


def test_a_base_with_an_adapter_merged_is_a_base():
    base = tiny_base("bart")
    config = peft.LoraConfig(r=4, target_modules=TARGETS["bart"], init_lora_weights=False)
    merged = peft.get_peft_model(base, config).merge_and_unload().eval()
    decoder_input_ids = tiny_labels("bart").clamp(min=0)
    with torch.no_grad():
        expected = merged(**tiny_inputs("bart"), decoder_input_ids=decoder_input_ids).logits
        model = NvibForConditionalGeneration.from_base_pretrained(merged)
        actual = model(**tiny_inputs("bart"), decoder_input_ids=decoder_input_ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- torch.compile
@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ONE_LAYER = {
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
}


def base_trains_whole(family):
    """Whether the base's training is one graph: in older versions of Transformers BART branches on a draw."""
    base = torch.compile(tiny_base(family, **ONE_LAYER[family]).train(), fullgraph=True, backend="eager")
    try:
        forward(base, family)
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_compiled_whole_without_a_break(family):
    dropping = {"alpha_threshold": 0.1, "dropping_share": 0.7, "lambda_vectors": 0.1, "word_dropout": 0.3}
    weights = {"lambda_gaussian": 0.1, "lambda_dirichlet": 0.1, "free_bits_dirichlet": 0.1}
    model = tiny_nvib(family, base=ONE_LAYER[family], **weights, **dropping)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluate(compiled, family).logits, evaluate(model, family).logits)

    if not base_trains_whole(family):
        return
    results = {}
    for name, which in (("eager", model), ("compiled", compiled)):
        which.train()
        model.zero_grad()
        torch.manual_seed(0)
        loss = forward(which, family).loss
        loss.backward()
        results[name] = loss.detach(), gradients(model)
    assert results["compiled"][1].keys() == results["eager"][1].keys()
    torch.testing.assert_close(results["compiled"], results["eager"], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # the compiler's own
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_to_kernels():
    """Draws differ from those of eager mode: the posterior is taken narrow, so that they hardly matter."""
    model = tiny_nvib(
        "bart", base=ONE_LAYER["bart"], lambda_gaussian=0.1, lambda_dirichlet=0.1, tau_sigma=1e-4, tau_alpha=12.0
    )
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    torch.testing.assert_close(evaluate(compiled, "bart").logits, evaluate(model, "bart").logits, rtol=1e-3, atol=1e-3)
    if not base_trains_whole("bart"):
        return
    model.train()
    expected = forward(model, "bart")
    actual = forward(compiled, "bart")
    torch.testing.assert_close(actual.kl_gaussian, expected.kl_gaussian, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=0.1, atol=0.1)
    actual.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# ------------------------------------------------------------------------------------------------------ half precision
ISLANDS = ("nvib.alpha_", "nvib.prior_", "nvib.dropping_share", "kl_beta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_loading_in_half_precision_keeps_its_islands(family, dtype, tmp_path):
    model = tiny_nvib(family)
    model.kl_beta.fill_(0.3)  # not a number of bfloat16
    model.save_pretrained(tmp_path / "single")
    half = NvibForConditionalGeneration.from_pretrained(tmp_path / "single", dtype=dtype)
    assert half.dtype == dtype and half.sample_latents(1, 2).z.dtype == dtype
    for name, value in tensors(half).items():
        if name.startswith(ISLANDS):
            assert value.dtype == torch.float32 and torch.equal(value, tensors(model)[name]), name
        elif value.is_floating_point() and not name.endswith("wo.weight"):  # which T5 keeps in fp32 beside fp16
            assert value.dtype == dtype, name
            assert torch.equal(value, tensors(model)[name].to(dtype)), name
    reference, outputs = evaluate(model, family), evaluate(half, family)
    for name in ("kl_gaussian", "kl_dirichlet"):
        torch.testing.assert_close(outputs[name], reference[name], rtol=0.01, atol=0)
    torch.testing.assert_close(outputs.loss, reference.loss, rtol=0.02, atol=0.02)
    assert generate(half, family, num_beams=2).shape == (3, 6)

    half.save_pretrained(tmp_path / "half")
    again = NvibForConditionalGeneration.from_pretrained(tmp_path / "half")
    for name, value in tensors(half).items():
        assert value.dtype == tensors(again)[name].dtype and torch.equal(value, tensors(again)[name]), name
    wide = NvibForConditionalGeneration.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {v.dtype for v in tensors(wide).values() if v.is_floating_point()} == {torch.float32}
    wrapped = NvibForConditionalGeneration.from_base_pretrained(half.unwrap())
    assert wrapped.nvib.alpha_quadratic.dtype == torch.float32 and wrapped.nvib.mu_logvar.weight.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_under_autocast(family, dtype):
    """The same draws in both: loss, divergences and direction of the gradient agree with single precision."""
    model = tiny_nvib(family, lambda_gaussian=0.1, lambda_dirichlet=0.1).train()
    results = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=dtype)):
        model.zero_grad()
        torch.manual_seed(0)
        with context:
            outputs = forward(model, family)
        outputs.loss.backward()
        assert outputs.loss.dtype == torch.float32
        flat = torch.cat([gradient.flatten() for gradient in gradients(model).values()])
        results.append((outputs.loss, outputs.kl_gaussian, outputs.kl_dirichlet, flat))
    single, half = results
    torch.testing.assert_close(half[0], single[0], rtol=0.03, atol=0.03)
    torch.testing.assert_close(half[1:3], single[1:3], rtol=0.01, atol=0)
    assert torch.cosine_similarity(half[3], single[3], dim=0) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_model_in_half_precision_trains(dtype, tmp_path):
    tiny_nvib().save_pretrained(tmp_path)
    settings = {"dtype": dtype, "lambda_gaussian": 0.1, "lambda_dirichlet": 0.1}
    model = NvibForConditionalGeneration.from_pretrained(tmp_path, **settings).train()
    forward(model, "bart").loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# ------------------------------------------------------------------------------------------------------------- loading
def stamp(model):
    """Every parameter and buffer filled with a number of its own; tied ones share it."""
    with torch.no_grad():
        for number, value in enumerate(tensors(model).values()):
            if value.is_floating_point():
                value.fill_(0.5 + number / 1024)
    return {name: value.clone() for name, value in tensors(model).items()}


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(
    "how",
    [{}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}, {"dtype": "auto"}],
    ids=str,
)
@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["whole", "sharded"])
def test_every_parameter_and_buffer_comes_back(family, how, shard, tmp_path):
    model = tiny_nvib(family)
    expected = stamp(model)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 5) == (shard == "20KB")
    loaded = tensors(NvibForConditionalGeneration.from_pretrained(tmp_path, **how))
    assert loaded.keys() == expected.keys()
    not_saved = set(expected) - set(model.state_dict())
    for name, value in loaded.items():
        assert value.device.type == "cpu" and value.isfinite().all(), name
        if name not in not_saved:
            assert torch.equal(value, expected[name]), name
    fresh = tensors(tiny_nvib(family))
    for name in not_saved:  # made anew, and as they were made
        assert torch.equal(loaded[name], fresh[name]), name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_weights_that_a_checkpoint_lacks_are_initialised(family, tmp_path):
    """Nothing is left from the memory that the model was built in."""
    base = tiny_base(family)
    base.save_pretrained(tmp_path)
    model = NvibForConditionalGeneration.from_base_pretrained(base, prior_var=0.5, tau_alpha=3.0)
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path, config=model.config, ignore_mismatched_sizes=True)
    for name, value in tensors(model).items():
        assert torch.equal(tensors(loaded)[name], value), name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_model_on_the_meta_device(family):
    config = tiny_nvib(family, prior_mu=[0.5] * 32).config
    with torch.device("meta"):
        model = NvibForConditionalGeneration(config)
    assert {value.device.type for value in tensors(model).values()} == {"meta"}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_offloaded_to_disk(family, tmp_path):
    """Weights are brought in for one module's call at a time: a layer read past its call would be on meta."""
    model = tiny_nvib(family)
    model.save_pretrained(tmp_path / "model")
    loaded = NvibForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert {p.device.type for p in loaded.parameters()} == {"meta"}
    torch.testing.assert_close(evaluate(loaded, family).logits, evaluate(model, family).logits)
    assert torch.equal(generate(loaded, family), generate(model, family))
    latents = loaded.encode(**tiny_inputs(family))
    torch.testing.assert_close(latents.kl_dirichlet, evaluate(model, family).kl_dirichlet)


def test_a_base_under_hooks():
    """As accelerate puts them on modules that it places: they keep the ``forward`` that was there before."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    base = tiny_base("bart")
    for module in base.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    model = NvibForConditionalGeneration.from_base_pretrained(base, tau_alpha=1.0, tau_sigma=0.3)
    plain = NvibForConditionalGeneration.from_base_pretrained(tiny_base("bart"), tau_alpha=1.0, tau_sigma=0.3)
    torch.testing.assert_close(evaluate(model, "bart").logits, evaluate(plain, "bart").logits)
    expected = evaluate(tiny_base("bart"), "bart").logits
    torch.testing.assert_close(evaluate(model.unwrap(), "bart").logits, expected)


# -------------------------------------------------------------------------------------------------------- quantisation
class Int8Linear(nn.Module):
    """A projection without a ``weight`` that could be read: rows of integers and their scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("scales", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.register_buffer("integers", (linear.weight.detach() / self.scales).round().to(torch.int8))
        self.bias = linear.bias

    @property
    def weight(self):
        raise RuntimeError("a quantised weight was read")

    def dequantised(self):
        return self.integers * self.scales

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert"])
def test_projections_whose_weight_cannot_be_read(family):
    model, dequantised = tiny_nvib(family), tiny_nvib(family)
    for quantised_module, plain_module in zip(cross_attention(model), cross_attention(dequantised), strict=True):
        for name, projection in list(quantised_module.named_children()):
            if isinstance(projection, nn.Linear):
                quantised = Int8Linear(projection)
                setattr(quantised_module, name, quantised)
                getattr(plain_module, name).weight.data.copy_(quantised.dequantised())
    expected = evaluate(dequantised, family)
    assert (expected.logits - evaluate(tiny_nvib(family), family).logits).abs().max() > 1e-3
    torch.testing.assert_close(evaluate(model, family).logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(model, family, num_beams=2), generate(dequantised, family, num_beams=2))


def test_a_quantised_base_may_be_wrapped():
    base, dequantised = tiny_base("bart"), tiny_base("bart")
    for layer, plain in zip(base.get_decoder().layers, dequantised.get_decoder().layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            quantised = Int8Linear(getattr(layer.encoder_attn, name))
            getattr(plain.encoder_attn, name).weight.data.copy_(quantised.dequantised())
            setattr(layer.encoder_attn, name, quantised)
    expected = evaluate(NvibForConditionalGeneration.from_base_pretrained(dequantised), "bart").logits
    model = NvibForConditionalGeneration.from_base_pretrained(base)
    torch.testing.assert_close(evaluate(model, "bart").logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForSeq2SeqLM, BitsAndBytesConfig

    wide = {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # 4 bits come in blocks of 64
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    tiny_base("bart", **wide).save_pretrained(tmp_path / "base")
    base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    decoder_input_ids = tiny_labels("bart").clamp(min=0)
    with torch.no_grad():
        expected = base(**tiny_inputs("bart"), decoder_input_ids=decoder_input_ids).logits
        model = NvibForConditionalGeneration.from_base_pretrained(base)
        actual = model(**tiny_inputs("bart"), decoder_input_ids=decoder_input_ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.1)
    assert model.is_quantized and type(model.nvib.mu_logvar) is nn.Linear
    model.save_pretrained(tmp_path / "nvib")
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path / "nvib")
    assert type(loaded.nvib.mu_logvar) is nn.Linear
    assert type(cross_attention(loaded)[0].k_proj).__module__.startswith("bitsandbytes")
    assert torch.equal(evaluate(loaded, "bart").logits, evaluate(model, "bart").logits)


# --------------------------------------------------------------------------------------------- gradient checkpointing
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model = tiny_nvib(family, lambda_gaussian=0.1, lambda_dirichlet=0.1, kappa=2).train()
    results = []
    for enable in (False, True):
        if enable:
            checkpoint_layers(model, {"use_reentrant": reentrant})
            model.enable_input_require_grads()
            assert model.is_gradient_checkpointing  # the name that all versions have
        model.zero_grad()
        torch.manual_seed(0)
        calls = count_calls(model)
        forward(model, family).loss.backward()
        results.append((gradients(model), calls["cross_attention"]))
    assert results[1][1] == 2 * results[0][1]  # computed again for the gradients
    assert results[0][0].keys() == results[1][0].keys()
    for name, gradient in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def count_calls(model):
    calls = {"cross_attention": 0}

    def count(*_):
        calls["cross_attention"] += 1

    for module in cross_attention(model):
        module.register_forward_pre_hook(count)
    return calls
