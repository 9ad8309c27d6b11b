"""Under ``torch_compile`` nothing that records makes a graph more: each is minutes of compiling a real model."""

import pytest
import torch
from tiny_training import WITH_COMPILE, tiny_model, trainer_of
from torch._dynamo.utils import counters
from transformers import Trainer

from nvib_hf import CollapseCallback, ConstraintCallback, NvibTrainer

ALL = [ConstraintCallback, CollapseCallback]


@pytest.mark.slow
@WITH_COMPILE
@pytest.mark.parametrize(("trainer_class", "callbacks"), [(Trainer, ALL), (NvibTrainer, []), (NvibTrainer, ALL)])
def test_recording_compiles_nothing(trainer_class, callbacks, tmp_path):
    """As many graphs as under a Trainer that records nothing, through steps, logs and an evaluation on the way."""

    def graphs(trainer_class, callbacks) -> int:
        torch.compiler.reset()
        counters.clear()
        made = [one(interval=1) if one is CollapseCallback else one(1e3, interval=1) for one in callbacks]
        trainer = trainer_of(
            trainer_class,
            tiny_model(),
            tmp_path,
            examples=8,
            callbacks=made,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            torch_compile=True,
            torch_compile_backend="eager",
        )
        trainer.train()
        logs = [x for x in trainer.state.log_history if "loss" in x]
        assert all(("cross_entropy" in x) == (trainer_class is NvibTrainer) for x in logs)
        assert not trainer.model._forward_hooks
        return counters["stats"]["unique_graphs"]

    assert graphs(trainer_class, callbacks) == graphs(Trainer, [])
