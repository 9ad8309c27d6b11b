"""Latents are a sequence over the batch and a mapping of their fields, to Python and to the tools that carry them."""

import copy
import dataclasses
import pickle
from collections import OrderedDict

import accelerate.utils
import pytest
import torch
from safetensors.torch import save_file
from tiny_latents import assert_same, mixture, sample
from tiny_models import tiny_inputs, tiny_labels
from tiny_nvib import tiny_nvib
from torch.distributed.utils import _apply_to_tensors
from torch.nn.parallel import scatter_gather
from torch.nn.parallel.distributed import _find_tensors
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from nvib_hf import NvibLatents, concatenate_latents
from nvib_hf.training.recording import Recorder

BOTH = pytest.mark.parametrize("make", [mixture, sample])


# A sequence


@BOTH
@pytest.mark.parametrize("batch", [1, 4])
def test_length_and_iteration_are_over_the_batch(make, batch):
    latents = make(batch=batch)
    rows = list(latents)
    assert len(latents) == len(rows) == batch
    for row, one in enumerate(rows):
        assert type(one) is NvibLatents and len(one) == 1
        assert_same(one, latents[row])
    assert_same(concatenate_latents(rows), latents)
    for one, other in zip(reversed(latents), reversed(rows), strict=True):
        assert_same(one, other)
    first, *others = latents
    assert_same(first, latents[0])
    assert len(others) == batch - 1


def test_none_of_them_is_false_and_one_is_true():
    with pytest.raises(TypeError, match="'z', 'log_pi', and 'attention_mask'"):
        NvibLatents()
    assert not mixture()[:0] and list(mixture()[:0]) == []
    assert mixture(batch=1)


def test_a_data_set():
    latents = mixture(batch=5)
    loader = DataLoader(latents, batch_size=2, collate_fn=concatenate_latents)
    assert_same(concatenate_latents(list(loader)), latents)
    assert [len(x) for x in loader] == [2, 2, 1]


# A mapping


@BOTH
def test_a_mapping_of_the_fields_that_are_given(make):
    latents = make()
    names = [field.name for field in dataclasses.fields(latents) if getattr(latents, field.name) is not None]
    as_keywords = (lambda **fields: fields)(**latents)
    for mapping in (dict(latents), OrderedDict(latents), {**latents}, as_keywords):
        assert list(mapping) == names
        assert all(mapping[name] is getattr(latents, name) for name in names)
    assert list(latents.keys()) == names and len(latents.keys()) == len(latents.items()) == len(names)
    assert [name for name, _ in latents.items()] == names
    assert all(value is latents[name] is getattr(latents, name) for name, value in latents.items())
    assert "z" in latents and ("logvar" in latents) == (make is mixture) and "kappa" not in latents
    with pytest.raises(KeyError, match="these latents have no 'kappa', but z, log_pi, attention_mask"):
        latents["kappa"]


@BOTH
@pytest.mark.parametrize(
    "way",
    [
        copy.copy,
        copy.deepcopy,
        lambda x: pickle.loads(pickle.dumps(x)),
        dataclasses.replace,
        lambda x: NvibLatents(**x),
        lambda x: NvibLatents(**dict(x)),
        lambda x: NvibLatents(**dict(x.items())),
        lambda x: pytree.tree_map(torch.clone, x),
        lambda x: pytree.tree_unflatten(*reversed(pytree.tree_flatten(x))),
        lambda x: pytree.tree_map_with_path(lambda path, value: value.clone(), x),
        lambda x: accelerate.utils.recursively_apply(torch.clone, x),
        lambda x: accelerate.utils.send_to_device(x, "cpu"),
        lambda x: concatenate_latents([x[:3], x[3:]]),
        lambda x: _apply_to_tensors(torch.clone, x),  # FSDP
    ],
)
def test_what_carries_them_hands_them_on(make, way):
    latents = make()
    other = way(latents)
    assert type(other) is NvibLatents
    assert_same(other, latents)


def test_a_replaced_field():
    latents = mixture()
    other = dataclasses.replace(latents, z=latents.z + 1, kappa=torch.ones(4))
    assert torch.equal(other["z"], latents.z + 1) and "kappa" in other and other.log_pi is latents.log_pi


def test_what_looks_for_tensors_and_sizes_in_them():
    latents = mixture()
    assert len(list(_find_tensors(latents))) == len(latents.keys())  # DistributedDataParallel
    with_keys, _ = pytree.tree_flatten_with_path(latents)
    assert [path[0].key for path, _ in with_keys] == list(latents.keys())


def test_compiled_whole():
    def between(latents: NvibLatents) -> NvibLatents:
        moved = NvibLatents(**{name: x + 1 if x.is_floating_point() else x for name, x in latents.items()})
        return moved if "logvar" in latents else latents

    latents = mixture()
    assert_same(torch.compile(between, fullgraph=True, backend="eager")(latents), between(latents))


# DataParallel: without a GPU its replicas, one after the other, and its scattering and gathering


def test_data_parallel_scatters_and_gathers(monkeypatch):
    monkeypatch.setattr(scatter_gather.Scatter, "apply", lambda devices, sizes, dim, x: x.chunk(len(devices), dim))
    monkeypatch.setattr(
        scatter_gather.Gather, "apply", lambda device, dim, *x: torch.cat([t[None] if t.dim() == 0 else t for t in x])
    )
    model = tiny_nvib()
    inputs = {name: x[:2] for name, x in {**tiny_inputs("bart"), "labels": tiny_labels("bart")}.items()}
    parts = scatter_gather.scatter(inputs, [0, 1])
    replica = model._replicate_for_data_parallel()
    gathered = scatter_gather.gather([replica(**part) for part in parts], "cpu")
    expected = [model(**part) for part in parts]
    for name in ("logits", "kl_gaussian", "num_vectors"):
        torch.testing.assert_close(gathered[name], torch.cat([x[name] for x in expected]))
    assert gathered.loss.shape == (2,) and gathered.latents is None and type(gathered) is type(expected[0])
    recorder, tokens = Recorder(), (inputs["labels"] != -100).sum(-1)
    recorder.hook(replica, (), inputs, gathered)
    recorded = recorder.read("cpu")
    assert recorded["num_vectors"] == pytest.approx(gathered.num_vectors.mean().item())
    assert recorded["kl_gaussian"] == pytest.approx(((tokens * gathered.kl_gaussian).sum() / tokens.sum()).item())

    # Latents are not split: one row of labels beside two latents is refused, not decoded from a wrong one.
    part, _ = scatter_gather.scatter({"encoder_outputs": model.encode(**tiny_inputs("bart"))[:2], **inputs}, [0, 1])
    with pytest.raises(ValueError, match="There are 2 latents but 1 decoder inputs"):
        replica(encoder_outputs=part["encoder_outputs"], labels=part["labels"])


# Files


@BOTH
def test_saved_and_loaded(make, tmp_path):
    latents = make().to(torch.bfloat16)
    file = tmp_path / "latents.safetensors"
    for path in (file, str(file)):  # the second time in the place of the first
        latents.save(path)
        assert_same(NvibLatents.load(path), latents)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert {x.device.type for _, x in NvibLatents.load(file, device="meta").items()} == {"meta"}


def test_views_of_one_tensor_are_saved_with_their_own_values(tmp_path):
    """What safetensors itself refuses: one tensor twice, transposed, expanded, a slice, with a gradient."""
    same = torch.rand(2)
    latents = NvibLatents(
        z=torch.randn(5, 2, 6, requires_grad=True).transpose(0, 1),
        log_pi=torch.zeros(1, 1).expand(2, 5),
        attention_mask=torch.ones(4, 5).bool()[2:],
        kl_gaussian=same,
        kl_dirichlet=same,
    )
    latents.save(tmp_path / "latents")
    assert_same(NvibLatents.load(tmp_path / "latents"), latents.detach())


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "latents"
    mixture().save(file)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            sample().save(file)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]
    assert_same(NvibLatents.load(file), mixture())
    with pytest.raises(FileNotFoundError):
        mixture().save(tmp_path / "absent" / "latents")


def test_a_file_of_something_else_is_refused(tmp_path):
    remedy = r"Pass a file that NvibLatents.save\(\) wrote. To load a model, call from_pretrained\(\)"
    mixture().save(tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:-40])
    torch.save(mixture(), tmp_path / "pickled")
    for name in ("half", "pickled"):
        with pytest.raises(
            ValueError, match=rf"{name} is not a whole safetensors file \(.*\). {remedy}.*torch.load\(\)"
        ):
            NvibLatents.load(tmp_path / name)
    tiny_nvib().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model is a folder. {remedy}"):
        NvibLatents.load(tmp_path / "model")
    with pytest.raises(
        ValueError, match=rf"holds no latents: 'base\..*', one of \d+ tensors, is not one of their fields. {remedy}"
    ):
        NvibLatents.load(tmp_path / "model" / "model.safetensors")
    save_file({"z": torch.zeros(1, 2, 3)}, tmp_path / "z")
    with pytest.raises(ValueError, match=rf"z holds no latents: it lacks 'attention_mask', 'log_pi'. {remedy}"):
        NvibLatents.load(tmp_path / "z")
    with pytest.raises(FileNotFoundError):
        NvibLatents.load(tmp_path / "absent")


@BOTH
def test_torch_loads_them_as_weights_only(make, tmp_path):
    torch.save({"texts": make(), "step": 3}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)["texts"]
    assert type(loaded) is NvibLatents
    assert_same(loaded, make())
