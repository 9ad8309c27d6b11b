"""One object for one pass: threads, a call inside a call and an exception cannot mix up what belongs to a pass."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import decoder_inputs, tiny_base, tiny_inputs, tiny_labels
from torch.nn.parallel import replicate
from torch.testing import assert_close

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.wrapping.self_attention import ForwardPass, current_pass

MODELS = {
    "every attention": {"attentions": ["cross", "encoder", "decoder"]},
    "stacked": {
        "attentions": ["cross", "encoder", "decoder"],
        "alpha_threshold": 1.0,
        "accumulate_alpha": True,
    },
}
over_models = pytest.mark.parametrize("which", MODELS)
over_families = pytest.mark.parametrize("family", ["bart", "t5"])
THREADS, CALLS = 4, 6


def model_of(which: str, family: str = "bart", **settings) -> NvibForConditionalGeneration:
    """In ``eval()``; variances and pseudo-counts matter, and where the layers are stacked each drops some vectors."""
    settings = {"tau_sigma": 0.3, "lambda_gaussian": 0.1, "lambda_dirichlet": 0.1, **MODELS[which], **settings}
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family), **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.nvib_layers().values():
            layer.alpha_quadratic.zero_()
            layer.alpha_weight.copy_(torch.randn(layer.size_in, generator=generator) / layer.size_in**0.5)
            layer.alpha_bias.fill_(0.4)
    return model.eval()


def batch_of(family: str, seed: int) -> dict[str, torch.Tensor]:
    """Of another number of examples for another seed, so that what belongs to another call does not even fit."""
    return {name: value[: 1 + seed % 3] for name, value in tiny_inputs(family, seed=seed).items()}


def forward(model: NvibForConditionalGeneration, family: str, seed: int) -> dict[str, torch.Tensor]:
    labels = tiny_labels(family, seed=seed)[: 1 + seed % 3]
    output = model(**batch_of(family, seed), labels=labels, generator=torch.Generator().manual_seed(seed))
    found = {name: output[name] for name in ("loss", "logits", "kl_gaussian", "kl_dirichlet", "prop_vectors")}
    for name in ("layer_kl_gaussian", "layer_kl_dirichlet", "layer_prop_vectors"):
        found |= {f"{name} {layer}": value for layer, value in output[name].items()}
    return found


def encode(model: NvibForConditionalGeneration, family: str, seed: int) -> dict[str, torch.Tensor]:
    return dict(model.encode(**batch_of(family, seed), generator=torch.Generator().manual_seed(seed)).items())


def generate(model: NvibForConditionalGeneration, family: str, seed: int) -> dict[str, torch.Tensor]:
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    return {"tokens": model.generate(**batch_of(family, seed), **options)}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


# ---------------------------------------------------------------------------------------------------- threads
@over_families
@over_models
@pytest.mark.parametrize("training", [False, True])
def test_threads_get_what_each_gets_alone(which, family, training):
    """In the middle of every pass, at the first layer of the encoder, a thread waits for another: they do overlap."""
    model = model_of(which, family).train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for config in (model.config.base_config, model.base):
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
    calls = [forward, encode] if training else [forward, encode, generate]
    work = [(calls[i % len(calls)], i) for i in range(THREADS * CALLS)]

    def run(call_and_seed):
        call, seed = call_and_seed
        with torch.no_grad():
            found = call(model, family, seed)
        assert current_pass() is None
        return found

    expected = [run(one) for one in work]
    meeting = threading.Barrier(2)

    def wait(*_) -> None:
        try:
            meeting.wait(timeout=0.2)
        except threading.BrokenBarrierError:
            meeting.reset()

    model.nvib_layers()["encoder.1"].register_forward_hook(wait)
    model.nvib_layers()["decoder.0"].register_forward_hook(wait)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, work))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
    assert current_pass() is None


@over_families
@over_models
@torch.no_grad()
def test_replicas_of_data_parallel_get_what_the_model_gets(which, family, monkeypatch):
    """As ``nn.DataParallel`` makes them, a thread for each, but on one device."""
    monkeypatch.setattr(
        sys.modules[replicate.__module__],
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach: [list(tensors) for _ in devices],
    )
    model, seeds = model_of(which, family), range(THREADS)
    expected = [forward(model, family, seed) for seed in seeds]
    replicas = replicate(model, list(seeds), detach=True)
    assert not {id(module) for module in model.modules()} & {id(module) for module in replicas[0].modules()}
    without_gradients = torch.no_grad()(forward)  # which each thread is told by itself
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda seed: without_gradients(replicas[seed], family, seed), seeds))
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_a_thread_is_in_no_pass_of_another():
    with ForwardPass() as this_pass:
        assert current_pass() is this_pass
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(current_pass).result() is None
    assert current_pass() is None


# -------------------------------------------------------------------------------------------- a call inside a call
@over_families
@over_models
@pytest.mark.parametrize("place", ["encoder.0", "encoder.1", "cross", "decoder.1"])
@pytest.mark.parametrize("inner_call", [forward, encode, generate])
@torch.no_grad()
def test_a_call_inside_a_call_has_a_pass_of_its_own(which, family, place, inner_call):
    model = model_of(which, family)
    expected, expected_inside = forward(model, family, 2), inner_call(model, family, 4)
    inside = []

    def call(*_) -> None:
        hook.remove()  # once
        outer = current_pass()
        inside.append(inner_call(model, family, 4))
        assert current_pass() is outer is not None

    hook = model.nvib_layers()[place].register_forward_hook(call)
    found = forward(model, family, 2)
    assert_same(found, expected)
    assert_same(*inside, expected_inside)
    assert current_pass() is None


# ---------------------------------------------------------------------------------------------------- exceptions
class Failed(Exception):
    pass


@over_families
@over_models
@pytest.mark.parametrize("place", ["encoder.0", "encoder.1", "cross", "decoder.1"])
@pytest.mark.parametrize("call", [forward, encode, generate])
@torch.no_grad()
def test_nothing_is_left_after_an_exception(which, family, place, call):
    if call is encode and place == "decoder.1":
        pytest.skip("encode does not run the decoder")
    model = model_of(which, family)
    expected = [one(model, family, 2) for one in (forward, encode, generate)]

    def fail(*_) -> None:
        raise Failed

    hook = model.nvib_layers()[place].register_forward_hook(fail)
    with pytest.raises(Failed):
        call(model, family, 4)
    hook.remove()
    assert current_pass() is None
    for one, other in zip((forward, encode, generate), expected, strict=True):
        assert_same(one(model, family, 2), other)


@over_families
@over_models
@torch.no_grad()
def test_nothing_is_left_of_an_encoder_that_failed_by_itself(which, family):
    model = model_of(which, family)
    expected = model.get_encoder()(**batch_of(family, 2)).last_hidden_state

    def fail(*_) -> None:
        raise Failed

    hook = model.nvib_layers()["encoder.1"].register_forward_hook(fail)
    with pytest.raises(Failed):
        model.get_encoder()(**batch_of(family, 4))
    hook.remove()
    assert current_pass() is None
    assert torch.equal(model.get_encoder()(**batch_of(family, 2)).last_hidden_state, expected)
    assert current_pass() is None


@over_models
@pytest.mark.parametrize("fails", [True, False])
def test_a_generator_is_of_its_own_pass_alone(which, fails):
    """Neither a forward that failed nor one that ended leaves its generator to the next."""
    model, labels = model_of(which).train(), tiny_labels("bart")
    inputs = {**tiny_inputs("bart"), "labels": labels}
    generator = torch.Generator().manual_seed(7)

    def fail(*_) -> None:
        raise Failed

    if fails:
        hook = model.nvib_layers()["decoder.0"].register_forward_hook(fail)
        with pytest.raises(Failed):
            model(**inputs, generator=generator)
        hook.remove()
    else:
        model(**inputs, generator=generator)
    used = generator.get_state()
    assert not torch.equal(used, torch.Generator().manual_seed(7).get_state())
    model.get_encoder()(**tiny_inputs("bart"))  # draws, and takes its generator from the pass that it is in
    model.generate(**tiny_inputs("bart"), max_new_tokens=2)
    torch.manual_seed(1)
    expected = model(**inputs)
    assert torch.equal(generator.get_state(), used)
    torch.manual_seed(1)
    again = model(**inputs)
    assert torch.equal(again.loss, expected.loss) and torch.equal(again.kl_gaussian, expected.kl_gaussian)


# ------------------------------------------------------------------------------------------------ no modules' state
@over_models
@torch.no_grad()
def test_modules_keep_nothing_of_a_pass(which):
    model = model_of(which)

    def state() -> dict:
        return {name: set(vars(module)) for name, module in model.named_modules()}

    before = state()
    for call in (forward, encode, generate):
        call(model, "bart", 2)
    model(**tiny_inputs("bart"), decoder_input_ids=decoder_inputs())
    assert state() == before
