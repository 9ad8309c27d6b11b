"""Cast to half precision, the layer and the model keep what has to cancel to the last bit in fp32."""

import copy

import pytest
import torch
from tiny_models import tiny_inputs, tiny_labels
from tiny_nvib import tensors, tiny_nvib
from torch import nn

from nvib_hf import DenoisingMultiheadAttention, Nvib

ISLANDS = ("alpha_", "prior_", "dropping_share", "kl_beta")
CASTS = {
    "half()": (lambda module: module.half(), torch.float16),
    "bfloat16()": (lambda module: module.bfloat16(), torch.bfloat16),
    "to(float16)": (lambda module: module.to(torch.float16), torch.float16),
    "to(cpu, bfloat16)": (lambda module: module.to("cpu", torch.bfloat16), torch.bfloat16),
    "type(bfloat16)": (lambda module: module.type(torch.bfloat16), torch.bfloat16),
}


def is_island(name):
    return name.removeprefix("nvib.").startswith(ISLANDS)


def layer(**settings):
    """With numbers in it that half precision has not."""
    module = Nvib(8, 8, prior_mu=0.1, prior_var=0.7, prior_alpha=1.3, delta=0.5, batch_first=True, **settings)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def made(which):
    return tiny_nvib() if which == "model" else layer()


@pytest.mark.parametrize("which", ["layer", "model"])
@pytest.mark.parametrize("cast", CASTS)
def test_casts_leave_the_islands_bit_by_bit(which, cast):
    module = made(which)
    before = {name: value.clone() for name, value in tensors(module).items()}
    parameters = dict(module.named_parameters())
    apply, dtype = CASTS[cast]
    assert apply(module) is module
    assert sum(map(is_island, before)) == 8 + (which == "model")
    for name, value in tensors(module).items():
        expected = before[name]
        if value.is_floating_point() and not is_island(name):
            expected = expected.to(dtype)
        assert value.dtype == expected.dtype and torch.equal(value, expected), name
    for name, parameter in module.named_parameters():  # an optimiser goes on seeing them
        assert parameter is parameters[name] and parameter.requires_grad, name


@pytest.mark.parametrize("which", ["layer", "model"])
def test_double_and_float_cast_everything(which):
    module = made(which).double()
    assert {value.dtype for value in tensors(module).values() if value.is_floating_point()} == {torch.float64}
    assert module.half().get_parameter("nvib.alpha_bias" if which == "model" else "alpha_bias").dtype == torch.float32
    module.float()
    assert {value.dtype for value in tensors(module).values() if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("which", ["layer", "model"])
def test_devices_and_memory(which):
    module = made(which)
    dtypes = {name: value.dtype for name, value in tensors(module.half()).items()}
    meta = copy.deepcopy(module).to("meta")
    empty = copy.deepcopy(meta).to_empty(device="cpu")
    both = made(which).to("meta", torch.float16)
    for moved, device in ((meta, "meta"), (empty, "cpu"), (both, "meta")):
        assert {name: value.dtype for name, value in tensors(moved).items()} == dtypes
        assert {value.device.type for value in tensors(moved).values()} == {device}
    assert all(value.is_shared() for value in tensors(module.share_memory()).values())
    again = made(which).half()
    again.load_state_dict(module.state_dict())
    for name, value in tensors(again).items():
        assert value.dtype == dtypes[name] and torch.equal(value, tensors(module)[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_cast_is_the_model_loaded_so(dtype):
    model, half = tiny_nvib(), tiny_nvib().to(dtype)
    inputs = {**tiny_inputs("bart"), "labels": tiny_labels("bart")}
    with torch.no_grad():
        reference, outputs = model(**inputs), half(**inputs)
    for name in ("kl_gaussian", "kl_dirichlet"):
        torch.testing.assert_close(outputs[name], reference[name], rtol=0.01, atol=0)
    torch.testing.assert_close(outputs.loss, reference.loss, rtol=0.02, atol=0.02)
    half.train()(**inputs).loss.backward()
    for name, parameter in half.named_parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_plain_pytorch_in_half_precision(dtype, training):
    """The README's layers, cast as a whole."""
    torch.manual_seed(0)
    nvib, attention = layer(scale=0.5), DenoisingMultiheadAttention(8, 2, batch_first=True)
    both = nn.ModuleList([nvib, attention]).train(training).to(dtype)
    latent = nvib(torch.randn(2, 5, 8, dtype=dtype))
    output, _ = attention(torch.randn(2, 3, 8, dtype=dtype), latent["z"], latent["z"])
    loss = output.float().square().mean() + nvib.kl_gaussian(**latent).mean() + nvib.kl_dirichlet(**latent).mean()
    loss.backward()
    assert output.dtype == dtype and latent["log_alpha"].dtype == torch.float32
    for name, parameter in both.named_parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
def test_an_adapter_s_copy_of_the_layer_is_cast_alike():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["nvib"])
    model = peft.get_peft_model(tiny_nvib(), config).to(torch.bfloat16)
    copied = {name: value.dtype for name, value in tensors(model).items() if "nvib.modules_to_save.default." in name}
    islands = [dtype for name, dtype in copied.items() if is_island(name.rsplit("default.", 1)[1])]
    assert len(islands) == 8 and set(islands) == {torch.float32} and torch.bfloat16 in copied.values()
