"""What ``test_distributed.py`` runs in two processes: rank 0 writes what it found to ``FOLDER/found.pt``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tiny_models import tiny_inputs, tiny_labels
from tiny_nvib import tensors, tiny_nvib
from torch import Tensor

from nvib_hf import CollapseCallback, NvibForConditionalGeneration, NvibTrainer
from nvib_hf.layers import distributions, dropping, nvib

EVERYWHERE = " with NVIB in all attentions"
FAMILIES = ["bart", "t5", "bert2bert", "bert2gpt2", f"bart{EVERYWHERE}"]
LENGTH = {"min_new_tokens": 5, "max_new_tokens": 5}
BATCH = 4
# Of a posterior: where they are called.
DRAWS = (
    (nvib, "log_dirichlet_sample"),
    (dropping, "log_dirichlet_sample"),
    (distributions, "log_gamma_sample"),
    (nvib, "gaussian_sample"),
)


def rows_of(rank: int, world: int) -> slice:
    return slice(rank * BATCH // world, (rank + 1) * BATCH // world)


def batch(family: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    family = family.removesuffix(EVERYWHERE)
    whole = {**tiny_inputs(family, BATCH), "labels": tiny_labels(family, BATCH)}
    return {name: value[rows] for name, value in whole.items()}


def fix_draws(rows: slice = slice(None)) -> None:
    """Each example gets draws of its own, whichever process it is in."""
    generator = torch.Generator().manual_seed(9)
    log_gamma = torch.randn(BATCH, 64, generator=generator)[rows]
    epsilon = torch.randn(BATCH, 64, 32, generator=generator)[rows]

    def log_dirichlet(log_alpha, mask=None, generator=None):
        scores = log_alpha + log_gamma[:, : log_alpha.shape[1]]
        return scores.masked_fill(~mask, -float("inf")).log_softmax(-1)

    def log_gamma_draws(log_alpha, generator=None):
        return log_alpha + log_gamma[:, : log_alpha.shape[1]]

    def gaussian(mu, logvar, mask=None, generator=None, repeats=1):
        z = mu + (0.5 * logvar).exp() * epsilon[:, : mu.shape[1]]
        return z.masked_fill(~mask[..., None], 0)

    for (module, name), draws in zip(DRAWS, (log_dirichlet, log_dirichlet, log_gamma_draws, gaussian), strict=True):
        setattr(module, name, draws)


def model_of(family: str) -> NvibForConditionalGeneration:
    attentions = ["cross", "encoder", "decoder"] if family.endswith(EVERYWHERE) else ["cross"]
    settings = {"lambda_gaussian": 0.1, "lambda_dirichlet": 0.1, "attentions": attentions}
    return tiny_nvib(family.removesuffix(EVERYWHERE), **settings)


# ------------------------------------------------------------------------------------------ distributed data parallel
def train_steps(model, examples: dict[str, Tensor], scale: float = 1.0, backward=Tensor.backward):
    """Two steps of plain descent: losses, and the gradients of the first."""
    tokens = (batch("bart")["labels"] != -100).sum()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], {}
    for _ in range(2):
        loss = model(**examples, num_items_in_batch=tokens).loss * scale
        backward(loss)
        if not gradients:
            named = model.named_parameters()
            gradients = {name.removeprefix("module."): p.grad.clone() for name, p in named if p.grad is not None}
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach() / scale)
    return torch.stack(losses), gradients


def ddp(rank: int, world: int, folder: Path) -> dict:
    """As the Trainer has it: each process scales its loss by their number, and gradients are averaged."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    found = {}
    for family in FAMILIES:
        fix_draws()
        expected = train_steps(model_of(family).train(), batch(family))
        fix_draws(rows_of(rank, world))
        model = accelerator.prepare(model_of(family).train())
        assert isinstance(model, torch.nn.parallel.DistributedDataParallel) and not model.find_unused_parameters
        losses, gradients = train_steps(model, batch(family, rows_of(rank, world)), world, accelerator.backward)
        dist.all_reduce(losses)
        unwrapped = accelerator.unwrap_model(model).eval()
        sources = {name: x for name, x in batch(family).items() if name != "labels"}
        tokens = unwrapped.generate(**sources, **LENGTH)
        found[family] = {"expected": expected, "actual": (losses, gradients), "tokens": tokens}
        assert type(unwrapped) is NvibForConditionalGeneration
    return found


def trainer(rank: int, world: int, folder: Path) -> dict:
    """The Trainer's own way, logs included."""
    fix_draws(rows_of(rank, world))
    return {"logs": run_trainer(folder / "trainer", examples(), BATCH // world)}


def examples() -> list[dict]:
    return [{name: value[row] for name, value in batch("bart").items()} for row in range(BATCH)]


def run_trainer(folder: Path, examples: list[dict], per_device: int) -> list[dict]:
    settings = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        learning_rate=1e-2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        optim="sgd",
        train_sampling_strategy="sequential",
    )
    model = model_of("bart").train()
    callbacks = [CollapseCallback(interval=1)]
    run = NvibTrainer(model, settings, train_dataset=examples, eval_dataset=examples, callbacks=callbacks)
    run.train()
    return [entry for entry in run.state.log_history if "loss" in entry or "eval_loss" in entry]


# --------------------------------------------------------------------------------------------------------------- FSDP2
def shard(model: NvibForConditionalGeneration, mesh, **settings):
    from torch.distributed.fsdp import fully_shard

    for half in (model.base.get_encoder(), model.base.get_decoder()):
        for layer in half.layers:
            fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def fsdp(rank: int, world: int, folder: Path) -> dict:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mesh = dist.init_device_mesh("cpu", (world,))
    inputs, found = tiny_inputs("bart", BATCH), {}
    plain, model = model_of("bart"), shard(model_of("bart"), mesh)
    drawn = plain.sample_latents(2, [3, 4])
    # Before a forward pass, after which parameters may stand gathered.
    optimisers = {which: torch.optim.SGD(which.parameters(), lr=0.1) for which in (model, plain)}

    def compare(name: str, function) -> None:
        found[name] = function(model), function(plain)

    def logits(which):
        with torch.no_grad():
            return which(**batch("bart")).logits

    # Before any forward: parameters are gathered for these, too.
    compare("generate", lambda which: which.generate(**inputs, **LENGTH))
    compare("encode", lambda which: dict(which.encode(**inputs).detach()))
    compare("beams of a sample", lambda which: which.generate(encoder_outputs=drawn, **LENGTH, num_beams=3))
    compare("evaluation", logits)

    def step(which):
        torch.manual_seed(3)
        which.train()
        loss = which(**batch("bart")).loss
        loss.backward()
        optimisers[which].step()
        which.eval()
        return loss.detach()

    compare("step", step)
    compare("evaluation after the step", logits)
    compare("generate after the step", lambda which: which.generate(**inputs, **LENGTH))

    full = states.get_model_state_dict(model, options=states.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        found["state_dict"] = full, plain.state_dict()
        plain.save_pretrained(folder / "saved", state_dict=dict(full))
        found["saved"] = tensors(NvibForConditionalGeneration.from_pretrained(folder / "saved")), tensors(plain)
    checkpoint.save({"model": states.get_model_state_dict(model)}, checkpoint_id=folder / "checkpoint")
    again = shard(model_of("bart"), mesh)
    state = {"model": states.get_model_state_dict(again)}
    checkpoint.load(state, checkpoint_id=folder / "checkpoint")
    states.set_model_state_dict(again, state["model"])
    found["resumed"] = logits(again), logits(model)

    def trained(which):
        torch.manual_seed(3)
        losses, _ = train_steps(which.train(), batch("bart"))
        return losses, which.eval().generate(**inputs, **LENGTH)

    everywhere = model_of(f"bart{EVERYWHERE}"), model_of(f"bart{EVERYWHERE}")
    found["all attentions"] = trained(shard(everywhere[0], mesh)), trained(everywhere[1])

    half = shard(model_of("bart"), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        outputs = half(**batch("bart"))
        expected = model_of("bart")(**batch("bart"))
    names = ("loss", "kl_gaussian", "kl_dirichlet")
    found["mixed precision"] = [outputs[name] for name in names], [expected[name] for name in names]
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    target = Path(sys.argv[1])
    dist.init_process_group("gloo")
    this, count = dist.get_rank(), dist.get_world_size()
    result = {case.__name__: case(this, count, target) for case in (fsdp, ddp, trainer)}  # the last two fix the draws
    if this == 0:
        torch.save(result, target / "found.pt")
    dist.barrier()
    dist.destroy_process_group()
