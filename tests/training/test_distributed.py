"""Two processes on one machine: DistributedDataParallel, the Trainer and FSDP2, against one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_worker as worker
import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


HERE = Path(__file__).parents[1]  # the tests, with the worker


def in_this_environment(command, folder):
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What rank 0 of two found, by case."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = in_this_environment([*command, str(HERE / "distributed_worker.py"), str(folder)], folder)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.parametrize("family", worker.FAMILIES)
def test_ddp_is_one_process_on_the_joined_batch(found, family):
    """No parameter is unused (the second step would raise), losses and gradients are those of the whole batch."""
    losses, gradients = found["ddp"][family]["actual"]
    expected_losses, expected_gradients = found["ddp"][family]["expected"]
    torch.testing.assert_close(losses, expected_losses)
    assert losses[0] != losses[1]
    assert gradients.keys() == expected_gradients.keys() and "nvib.alpha_quadratic" in gradients
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert found["ddp"][family]["tokens"].shape == (4, 6)


# As a user's: nothing in it knows of processes, but for the draws.
SCRIPT = """
import json, os
from pathlib import Path
import distributed_worker as worker

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
worker.fix_draws(worker.rows_of(rank, world))
logs = worker.run_trainer(Path("out"), worker.examples(), worker.BATCH // world)
if rank == 0:
    Path("logs.json").write_text(json.dumps({"world": world, "logs": logs}))
worker.dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The logs of a script under the command of examples/TOOLS.md for two processes without a GPU."""
    page = (Path(__file__).parents[2] / "examples" / "TOOLS.md").read_text(encoding="utf-8")
    command = re.search(r"without\s+a GPU `(torchrun [^`]+ train\.py)`", page)[1].split()
    folder = tmp_path_factory.mktemp("launched")
    (folder / "train.py").write_text(SCRIPT)
    finished = in_this_environment([str(Path(sys.executable).parent / command[0]), *command[1:]], folder)
    assert finished.returncode == 0, finished.stderr[-5000:]
    logs = json.loads((folder / "logs.json").read_text())
    assert logs["world"] == 2
    return {"trainer": logs}


@pytest.mark.parametrize("how", ["found", "launched"])
def test_trainer_in_two_processes_logs_what_one_does(how, request, tmp_path, monkeypatch):
    logs = request.getfixturevalue(how)["trainer"]["logs"]
    for module, name in worker.DRAWS:
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    worker.fix_draws()
    expected = worker.run_trainer(tmp_path / "one", worker.examples(), worker.BATCH)
    compared = ("loss", "grad_norm", "cross_entropy", "kl_gaussian", "kl_dirichlet", "num_vectors")
    compared = (*compared, "evaluation_cross_entropy")
    assert len(logs) == len(expected) == 4
    for entry, reference in zip(logs[:3], expected[:3], strict=True):
        for name in compared:
            assert entry[name] == pytest.approx(reference[name], rel=1e-3), name
    for name in ("eval_loss", "eval_cross_entropy", "eval_kl_gaussian", "eval_kl_dirichlet", "eval_num_vectors"):
        assert logs[3][name] == pytest.approx(expected[3][name], rel=1e-3), name


COMPARED = [
    "generate",
    "encode",
    "beams of a sample",
    "evaluation",
    "step",
    "evaluation after the step",
    "generate after the step",
    "state_dict",
    "saved",
    "resumed",
    "all attentions",
]


@pytest.mark.parametrize("what", COMPARED)
def test_fsdp2_is_the_model_without_it(found, what):
    """``encode`` and ``generate`` included, which FSDP2 knows nothing of by itself."""
    actual, expected = found["fsdp"][what]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_fsdp2_in_mixed_precision(found):
    (loss, *divergences), (expected_loss, *expected) = found["fsdp"]["mixed precision"]
    torch.testing.assert_close(loss.float(), expected_loss, rtol=0.03, atol=0.03)
    torch.testing.assert_close(divergences, expected, rtol=0.01, atol=0)
