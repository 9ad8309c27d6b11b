"""A wrapped model as a graph of torch.export or ONNX, and what that computes of inputs of other sizes."""

import io
from functools import partial

import pytest
import torch
from tiny_models import BERT_LIKE, FAMILIES, decoder_inputs, tiny_inputs, tiny_labels
from tiny_nvib import generate, tiny_nvib
from torch import Tensor, nn
from torch.export import Dim
from transformers import BertConfig, BertForSequenceClassification, EncoderDecoderCache

from nvib_hf import NvibForSequenceClassification, NvibLatents

MAIN = ["bart", "t5", "marian", "whisper"]
BART_LIKE = {"encoder_layers": 1, "decoder_layers": 1}
ONE_LAYER = {
    "bart": BART_LIKE,
    "t5": {"num_layers": 1, "num_decoder_layers": 1},
    "marian": BART_LIKE,
    "whisper": BART_LIKE,
}
OF_THE_BASE = "torch.export of the unmodified base fails, too: "
NOT_EXPORTED = {
    "nllb_moe": OF_THE_BASE + "its router casts its own weights",
    "switch_transformers": OF_THE_BASE + "its router casts its own weights",
    "led": OF_THE_BASE + "whether it attends globally depends on a mask",
}
DROPPING = {"alpha_threshold": 2500.0}  # about half of the vectors
SETTINGS = {
    "means": {},
    "mixture": {"evaluation": "mixture"},
    "exact": {"evaluation": "mixture", "exact_attention": True},
    "dropping": DROPPING,
    "dropping, mixture": {**DROPPING, "evaluation": "mixture"},
    "everywhere": {"attentions": ["cross", "encoder", "decoder"]},
    "everywhere, mixture": {"attentions": ["cross", "encoder", "decoder"], "evaluation": "mixture"},
}


# ------------------------------------------------------------------------------------------- the three graphs
class Graph(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.eval()  # in whose mode an exporter leaves the model


class Encoder(Graph):
    """Inputs, in the order of ``names``, to what a decoder reads of their latents."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__(model)
        self.names = names

    def forward(self, source: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        latents = self.model.encode(**dict(zip(self.names, source, strict=True)))
        return latents.z, latents.logvar, latents.log_pi


class Decoder(Graph):
    """Logits, and the cache as tensors, of tokens and latents; with the cache of earlier tokens, if there is one."""

    def forward(self, tokens: Tensor, latents: tuple[Tensor, ...], cached: tuple[Tensor, ...] = ()):
        z, logvar, log_pi = latents
        given = {"encoder_outputs": NvibLatents(z, log_pi, log_pi > -torch.inf, logvar), "decoder_input_ids": tokens}
        cache = EncoderDecoderCache([cached[at : at + 4] for at in range(0, len(cached), 4)])
        logits = self.model(**given, cache=cache, use_cache=True).logits
        pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        layers = [(own.keys, own.values, cross.keys, cross.values) for own, cross in pairs]
        return logits, *(tensor for layer in layers for tensor in layer)


class Whole(Encoder):
    """Logits of inputs and tokens."""

    def forward(self, source: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor]:
        inputs = dict(zip(self.names, source, strict=True))
        return (self.model(**inputs, decoder_input_ids=tokens, use_cache=False).logits,)


def leaves(value) -> list[Tensor]:
    """The tensors of nested tuples, in order."""
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in leaves(part)]


def changing(tensor: Tensor, fixed_length: bool) -> list[int]:
    """Which sizes of an input change: the batch, and the length unless it is 1 or the model's own."""
    length = 2 if tensor.dim() == 4 else 1  # of keys and values, of all others
    return [0] if fixed_length or tensor.shape[length] == 1 else [0, length]


def dynamic_shapes(value, fixed_length: bool):
    if isinstance(value, Tensor):
        return dict.fromkeys(changing(value, fixed_length), Dim.DYNAMIC)
    return tuple(dynamic_shapes(part, fixed_length) for part in value)


# ------------------------------------------------------------------------------------------- what becomes of them
def as_program(graph: Graph, inputs: tuple, fixed_length: bool):
    """What ``torch.export`` makes of a graph, to be called as that is."""
    shapes = dynamic_shapes(inputs, fixed_length)
    return torch.export.export(graph, inputs, dynamic_shapes=shapes, strict=False).module()


def as_onnx(graph: Graph, inputs: tuple, fixed_length: bool, dynamo: bool = True):
    """A graph in onnxruntime, to be called as it is."""
    onnxruntime = pytest.importorskip("onnxruntime")
    names, file = [f"input_{i}" for i in range(len(leaves(inputs)))], io.BytesIO()
    if dynamo:
        sizes = {"dynamic_shapes": dynamic_shapes(inputs, fixed_length), "verbose": False}
        torch.onnx.export(graph, inputs, input_names=names, **sizes).save(file)
    else:
        named = zip(names, leaves(inputs), strict=True)
        axes = {name: {i: f"{name}_{i}" for i in changing(tensor, fixed_length)} for name, tensor in named}
        torch.onnx.export(graph, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    read = {one.name for one in session.get_inputs()}  # what has no part in the outputs is left out

    def call(*inputs) -> tuple[Tensor, ...]:
        given = {name: x.numpy() for name, x in zip(names, leaves(inputs), strict=True) if name in read}
        return tuple(map(torch.from_numpy, session.run(None, given)))

    return call


WAYS = {"export": as_program, "dynamo": as_onnx, "legacy": partial(as_onnx, dynamo=False)}


def check_three_graphs(model, family: str, make) -> None:
    """Export with a batch of 3, encode, decode and go on with a batch of 5 and other lengths: as the model does."""
    inputs, tokens = tiny_inputs(family), decoder_inputs()
    names, fixed_length = list(inputs), family == "whisper"
    encoder, decoder, source = Encoder(model, names), Decoder(model), tuple(inputs.values())
    latents = encoder(source)
    _, *cached = (tensor.detach() for tensor in decoder(tokens, latents))
    encode = make(encoder, (source,), fixed_length)
    decode = make(decoder, (tokens, latents), False)
    go_on = make(decoder, (tokens[:, :1], latents, tuple(cached)), False)

    inputs, tokens = tiny_inputs(family, batch=5, seed=1), decoder_inputs(batch=5, length=8)
    if not fixed_length:
        inputs = {name: value[:, :8] for name, value in inputs.items()}
    expected = model(**inputs, decoder_input_ids=tokens).logits
    latents = encode(tuple(inputs.values()))
    logits, *cached = decode(tokens[:, :5], latents)
    assert_close(logits, expected[:, :5])
    for at in range(5, 8):
        logits, *cached = go_on(tokens[:, at : at + 1], latents, tuple(cached))
        assert_close(logits, expected[:, at : at + 1])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------- encoder-decoders
slow_dynamo = pytest.param("dynamo", marks=pytest.mark.slow)  # half a minute of tracing
# That it is the old one, and what it calls.
old_exporter = pytest.mark.filterwarnings(
    "ignore:(You are using the legacy|The feature will be removed):DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)


@old_exporter
@pytest.mark.parametrize("way", ["export", "legacy", slow_dynamo])
@pytest.mark.parametrize("family", MAIN)
@torch.no_grad()
def test_encoder_decoder_and_cache(family, way):
    check_three_graphs(tiny_nvib(family, base=ONE_LAYER[family]), family, WAYS[way])


@old_exporter
@pytest.mark.parametrize("family", MAIN)
def test_with_gradients_on(family):
    """The bias of attention is then in further channels of the keys."""
    check_three_graphs(tiny_nvib(family, base=ONE_LAYER[family]), family, WAYS["legacy"])


@old_exporter
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.no_grad()
def test_settings(settings):
    model = tiny_nvib("bart", base=ONE_LAYER["bart"], **settings)
    kept = model.encode(**tiny_inputs("bart", batch=5, seed=1)).prop_vectors
    assert ((kept < 1).any() and (kept > 0).any()) == ("alpha_threshold" in settings)
    check_three_graphs(model, "bart", WAYS["legacy"])


@old_exporter
@torch.no_grad()
def test_a_width_that_is_no_multiple_of_the_heads():
    """Of the mixture's variances each head has a slice in its keys, the last one's filled up."""
    model = tiny_nvib("t5", base={**ONE_LAYER["t5"], "d_model": 30}, evaluation="mixture")
    check_three_graphs(model, "t5", WAYS["legacy"])


@pytest.mark.parametrize("way", ["export", slow_dynamo])
@torch.no_grad()
def test_a_mixture_with_dropping_in_every_layer(way):
    settings = {**SETTINGS["dropping, mixture"], "attentions": ["cross", "encoder", "decoder"]}
    model = tiny_nvib("bart", base=ONE_LAYER["bart"], **settings)
    kept = model(**tiny_inputs("bart", batch=5, seed=1), decoder_input_ids=decoder_inputs(5)).layer_prop_vectors
    assert all(0 < kept[name].mean() < 1 for name in ("encoder.0", "cross"))
    check_three_graphs(model, "bart", WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_architecture_for_any_batch(family):
    if family in NOT_EXPORTED:
        pytest.skip(NOT_EXPORTED[family])
    model, inputs = tiny_nvib(family), tiny_inputs(family)
    graph = Whole(model, list(inputs))
    program = as_program(graph, (tuple(inputs.values()), decoder_inputs()), fixed_length=True)
    others = tuple(tiny_inputs(family, batch=5, seed=1).values()), decoder_inputs(5)
    assert_close(program(*others)[0], graph(*others)[0])


# ------------------------------------------------------------------------------------------- what is in a graph
def operations(model: nn.Module, inputs: dict) -> set[str]:
    program = torch.export.export(model, (), inputs, strict=False)
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("attentions", [["cross"], ["cross", "encoder", "decoder"]])
@torch.no_grad()
def test_the_divergences_are_in_a_graph_that_returns_a_loss_and_in_no_other(attentions):
    model = tiny_nvib("bart", base=ONE_LAYER["bart"], attentions=attentions)
    inputs = {**tiny_inputs("bart"), "decoder_input_ids": decoder_inputs(), "use_cache": False}
    assert not any("lgamma" in name for name in operations(model, inputs))
    assert any("lgamma" in name for name in operations(model, {**tiny_inputs("bart"), "labels": tiny_labels("bart")}))
    outputs = model(**inputs)  # as ever, where nothing is exported
    assert outputs.kl_gaussian is not None and outputs.latents.kl_dirichlet is not None


@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_generation_computes_no_divergence(family, monkeypatch):
    model = tiny_nvib(family, base=ONE_LAYER[family], attentions=["cross", "encoder", "decoder"])
    expected = generate(model, tiny_inputs(family), num_beams=2)

    def computed(*_):
        raise AssertionError("a divergence was computed")

    monkeypatch.setattr("nvib_hf.layers.nvib.gaussian_divergence", computed)
    monkeypatch.setattr("nvib_hf.layers.nvib.dirichlet_divergence", computed)
    assert torch.equal(generate(model, tiny_inputs(family), num_beams=2), expected)
    with pytest.raises(AssertionError, match="a divergence was computed"):
        model(**tiny_inputs(family), decoder_input_ids=decoder_inputs())


class Classifier(Graph):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.model(input_ids=input_ids, attention_mask=attention_mask).logits,)


@old_exporter
@pytest.mark.parametrize("way", ["export", "legacy"])
@torch.no_grad()
def test_a_classifier_with_dropping(way):
    base = BertForSequenceClassification(BertConfig(**{**BERT_LIKE, "num_hidden_layers": 2})).eval()
    settings = {"tau_alpha": 1.0, "tau_sigma": 0.3, "alpha_threshold": 800.0}
    model = NvibForSequenceClassification.from_base_pretrained(base, **settings).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("alpha_weight"):  # a norm after every layer makes all vectors equally long
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    graph = Classifier(model)
    run = WAYS[way](graph, tuple(tiny_inputs("bart").values()), fixed_length=False)
    others = {name: value[:, :8] for name, value in tiny_inputs("bart", batch=5, seed=1).items()}
    assert 0 < model(**others).layer_prop_vectors["encoder.0"].mean() < 1
    assert_close(run(*others.values())[0], graph(*others.values())[0])


@old_exporter
@pytest.mark.parametrize("way", ["export", "legacy"])
@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [("bart", {"merge_share": 0.5}, "merge_share = 1"), ("whisper", {"encode_sound_only": True}, "encode_sound_only")],
)
@torch.no_grad()
def test_what_makes_a_number_of_vectors_that_depends_on_values_is_refused(family, settings, message, way):
    inputs = tiny_inputs(family)
    graph = Encoder(tiny_nvib(family, base=ONE_LAYER[family], **settings), list(inputs))
    with pytest.raises(ValueError, match=message):
        WAYS[way](graph, (tuple(inputs.values()),), fixed_length=family == "whisper")
