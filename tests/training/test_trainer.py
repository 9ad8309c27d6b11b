"""Training with the Trainers of Transformers: what is optimised, what is logged, and that both survive a restart."""

import json
import math
import os
import socket

import pytest
import torch
from tiny_models import tiny_base
from tiny_text import tiny_collator, tiny_examples, tiny_tokenizer
from tiny_training import TRAINERS, WITH_COMPILE, WITH_PEFT, PlainNvibTrainer, tiny_model, trainer_of
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

import nvib_hf
from nvib_hf import KLAnnealingCallback, NvibForConditionalGeneration, NvibTrainer
from nvib_hf.training.recording import find_nvib_model

TERMS = [
    "cross_entropy",
    "kl_gaussian",
    "kl_dirichlet",
    "num_vectors",
    "prop_vectors",
    "effective_vectors",
]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def fixed_draws(monkeypatch):
    """Draws that depend on nothing but a vector's parameters and place: the same in any batch."""

    def log_dirichlet(log_alpha, mask, generator=None):
        places = torch.arange(log_alpha.shape[-1])
        noisy = log_alpha + 0.5 * torch.cos(3.0 * places)
        return noisy.masked_fill(~mask, -math.inf).log_softmax(-1)

    def gaussian(mu, logvar, mask, generator=None, repeats=1):
        mu, logvar, mask = (x.repeat_interleave(repeats, dim=1) for x in (mu, logvar, mask))
        places = torch.arange(mu.shape[1])[:, None] + 7 * torch.arange(mu.shape[2])
        return (mu + torch.exp(0.5 * logvar) * torch.sin(places.float())).masked_fill(~mask[..., None], 0)

    for module in ("nvib", "dropping"):
        monkeypatch.setattr(f"nvib_hf.layers.{module}.log_dirichlet_sample", log_dirichlet)
    monkeypatch.setattr("nvib_hf.layers.nvib.gaussian_sample", gaussian)


# ---------------------------------------------------------------------------------------------- optimisation
@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_trains(trainer_class, family, tmp_path):
    model = tiny_model(family, lambda_gaussian=1e-3, lambda_dirichlet=1e-3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(trainer_class, model, tmp_path, examples=4, max_steps=25, learning_rate=5e-3)
    trainer.train()
    first, last = losses(trainer)[0], losses(trainer)[-1]
    assert last < 0.5 * first, losses(trainer)
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unmoved


def step(folder, batch_size, accumulation, **settings):
    """One step of plain gradient descent on the same 8 examples: logged loss and the change of every weight."""
    model = tiny_model(tau_sigma=0.5, tau_alpha=1.0, kappa=2, **settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = trainer_of(
        Trainer,
        model,
        folder,
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
    )
    trainer.train()
    change = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    return losses(trainer)[0], change


def relative_difference(first, second):
    """Of two loss-and-change pairs: the larger of the loss's and the gradient's."""
    distance = math.sqrt(sum((first[1][name] - second[1][name]).square().sum().item() for name in first[1]))
    size = math.sqrt(sum(change.square().sum().item() for change in second[1].values()))
    return max(abs(first[0] / second[0] - 1), distance / size)


def test_accumulation_changes_nothing(tmp_path, fixed_draws, monkeypatch):
    """4 x 2 = 1 x 8 examples of unequal length, where the KL terms weigh as much as the cross-entropy."""
    whole = step(tmp_path, 8, 1)
    without_kl = step(tmp_path, 8, 1, lambda_gaussian=0.0, lambda_dirichlet=0.0)
    assert relative_difference(without_kl, whole) > 0.3
    for batch_size, accumulation in ((2, 4), (4, 2), (1, 8)):
        assert relative_difference(step(tmp_path, batch_size, accumulation), whole) < 1e-4

    # The two plausible mistakes would have been seen: a KL that is a mean of its micro-batch, over tokens ...
    right = nvib_hf.modeling_nvib.nvib_loss

    def unscaled(logits, labels, kl, items, smoothing):
        loss, cross_entropy = right(logits, labels, None, items, smoothing)
        return loss + right(logits, labels, kl)[0] - right(logits, labels, None)[0], cross_entropy

    # ... and one that is scaled, but weights examples equally.
    def over_examples(logits, labels, kl, items, smoothing):
        loss, cross_entropy = right(logits, labels, None, items, smoothing)
        return loss + kl.mean() * (labels != -100).sum() / items, cross_entropy

    for mistake in (unscaled, over_examples):
        monkeypatch.setattr("nvib_hf.modeling_nvib.nvib_loss", mistake)
        assert relative_difference(step(tmp_path, 2, 4), step(tmp_path, 8, 1)) > 0.02


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Stops a training dead at the beginning of a step."""

    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise Killed


class Probe(TrainerCallback):
    """Writes down the annealing at each step, as the loss will use it."""

    def __init__(self):
        self.betas = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.betas[state.global_step] = model.kl_beta.tolist()


def test_resume_is_as_if_nothing_had_happened(tmp_path):
    """Dropout, draws, order of the examples, annealing, optimiser: all go on where the checkpoint left them."""

    def run(folder, seed, *callbacks, **arguments):
        model = tiny_model(seed=seed, dropout=0.2, kappa=2)
        probe = Probe()
        annealing = KLAnnealingCallback("cosine", warmup_ratio=0.75, start_ratio=0.125)
        trainer = trainer_of(
            NvibTrainer,
            model,
            folder,
            examples=10,
            callbacks=[*callbacks, annealing, probe],
            max_steps=8,
            save_strategy="steps",
            save_steps=3,
            eval_strategy="steps",
            eval_steps=4,
            lr_scheduler_type="linear",
        )
        return trainer, probe

    whole, all_betas = run(tmp_path / "whole", 0)
    whole.train()
    killed, _ = run(tmp_path / "killed", 0, Kill(at=5))
    with pytest.raises(Killed):
        killed.train()
    resumed, betas = run(tmp_path / "killed", 1)
    resumed.train(resume_from_checkpoint=True)

    ignored = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos", "train_loss"}
    ignored |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}

    def history(trainer):
        return [{k: v for k, v in entry.items() if k not in ignored} for entry in trainer.state.log_history]

    assert history(resumed) == history(whole)
    assert len(losses(resumed)) == 8 and set(TERMS) <= set(history(resumed)[0])
    assert min(betas.betas) == 3 and betas.betas == {k: v for k, v in all_betas.betas.items() if k >= 3}
    assert len({tuple(beta) for beta in betas.betas.values()}) == 5
    for (name, expected), value in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=name)


def test_checkpoint_of_the_trainer_is_a_model(tmp_path):
    model = tiny_model()
    trainer_of(Trainer, model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    loaded = NvibForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    inputs = tiny_collator()(tiny_examples(3))
    torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------- annealing
def cosine(x):
    return 0.5 - 0.5 * math.cos(math.pi * x)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"schedule": "constant"}, lambda x: 1.0),
        ({"schedule": "constant", "start_ratio": 0.3}, lambda x: float(x >= 0.3)),
        ({"schedule": "linear", "warmup_ratio": 0.5}, lambda x: min(2 * x, 1.0)),
        ({"schedule": "linear", "warmup_ratio": 0.5, "start_ratio": 0.2}, lambda x: min(max(2 * x - 0.4, 0.0), 1.0)),
        ({"schedule": "linear", "warmup_ratio": 1.0}, lambda x: x),
        ({"schedule": "linear", "warmup_ratio": 0.0, "start_ratio": 0.5}, lambda x: float(x >= 0.5)),
        ({"schedule": "cosine", "warmup_ratio": 0.4}, lambda x: cosine(min(x / 0.4, 1.0))),
        (
            {"schedule": "cosine", "warmup_ratio": 0.5, "start_ratio": 0.25},
            lambda x: cosine(min(max(2 * x - 0.5, 0.0), 1.0)),
        ),
        (
            {"schedule": "cyclic", "warmup_ratio": 0.5, "cycles": 4},
            lambda x: min(2 * (4 * x - math.floor(4 * x)), 1.0),
        ),
        (
            {"schedule": "cyclic", "warmup_ratio": 0.8, "cycles": 3, "start_ratio": 0.1},
            # 0.9 of the steps in three cycles of 0.3, each rising over its first 0.24
            lambda x: 0.0 if x < 0.1 else min(math.fmod(round(100 * x) - 10, 30) / 24, 1.0),
        ),
    ],
)
def test_annealing_follows_its_formula(arguments, expected):
    callback = KLAnnealingCallback(**arguments)
    for percent in range(101):
        assert callback.beta(percent / 100) == pytest.approx(expected(percent / 100), abs=1e-9), percent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "exponential"}, "schedule must be one of 'constant', 'linear', 'cosine', 'cyclic'"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\], but got 1.5"),
        ({"start_ratio": -0.1}, r"start_ratio must be in \[0, 1\], but got -0.1"),
        ({"cycles": 0}, "cycles must be at least 1, but got 0"),
        ({"terms": ()}, "terms must be some of 'gaussian', 'dirichlet'"),
        ({"terms": "gauss"}, "terms must be some of 'gaussian', 'dirichlet'"),
    ],
)
def test_annealing_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        KLAnnealingCallback(**arguments)


def test_annealing_acts_on_the_loss(tmp_path, fixed_draws):
    """Two schedules, one for each term; weights that stay where they are, so that each loss is known."""
    model = tiny_model(tau_sigma=0.5, tau_alpha=1.0, kappa=2)
    callbacks = [
        KLAnnealingCallback("linear", warmup_ratio=1.0, terms="gaussian"),
        KLAnnealingCallback("constant", start_ratio=0.5, terms=["dirichlet"]),
    ]
    trainer = trainer_of(
        NvibTrainer,
        model,
        tmp_path,
        callbacks=callbacks,
        max_steps=4,
        per_device_train_batch_size=8,
        learning_rate=0.0,
    )
    trainer.train()
    for t, entry in enumerate(trainer.state.log_history[:4]):
        gaussian = t / 4 * 0.2 * entry["kl_gaussian"]
        dirichlet = (t >= 2) * 0.3 * entry["kl_dirichlet"]
        assert entry["loss"] == pytest.approx(entry["cross_entropy"] + gaussian + dirichlet, rel=1e-5)
    assert 0.2 * entry["kl_gaussian"] > 0.1 and 0.3 * entry["kl_dirichlet"] > 0.1


# ---------------------------------------------------------------------------------------------- logs
@torch.no_grad()
def terms_by_hand(model, examples, training):
    """Means of what the model returns for one example at a time: over tokens, and over examples."""
    model.train(training)
    sums, tokens = dict.fromkeys(TERMS, 0.0), 0
    for example in examples:
        out = model(**tiny_collator()([example]))
        count = len(example["labels"])
        tokens += count
        for name in TERMS[:3]:
            sums[name] += count * out[name].item()
        for name in TERMS[3:]:
            sums[name] += out.latents[name].item()
    return {name: value / (tokens if name in TERMS[:3] else len(examples)) for name, value in sums.items()}


@pytest.mark.parametrize(
    ("trainer_class", "predict_with_generate"),
    [(PlainNvibTrainer, False), (NvibTrainer, False), (NvibTrainer, True)],
)
def test_logs_are_means_over_tokens_and_examples(trainer_class, predict_with_generate, tmp_path, fixed_draws):
    # Evaluations between the steps that one log is about.
    arguments = {"learning_rate": 0.0, "num_train_epochs": 1, "logging_steps": 3}
    arguments |= {"eval_strategy": "steps", "eval_steps": 1}
    if predict_with_generate:
        arguments |= {"predict_with_generate": True, "generation_max_length": 6}
    # A threshold in the midst of the pseudo-counts, so that vectors are dropped.
    model = tiny_model(tau_alpha=1.0, tau_sigma=0.5, kappa=2, alpha_threshold=850.0)
    arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
    trainer = trainer_of(trainer_class, model, tmp_path, examples=11, **arguments)
    trainer.train()

    expected = terms_by_hand(model, trainer.train_dataset, training=True)
    assert 0.1 < expected["prop_vectors"] < 0.9 and expected["kl_gaussian"] > 0.1
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 1
    assert {name: logged[0][name] for name in TERMS} == pytest.approx(expected, rel=1e-5)

    expected = terms_by_hand(model, trainer.eval_dataset, training=False)
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    predicted = trainer.predict(trainer.eval_dataset).metrics
    again = trainer.evaluate()
    for metrics, prefix in ((evaluated, "eval"), (predicted, "test"), (again, "eval")):
        assert {name: metrics[f"{prefix}_{name}"] for name in TERMS} == pytest.approx(expected, rel=1e-5)
        assert f"{prefix}_loss" in metrics


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_loss_of_an_evaluation_is_exact(batch_size, tmp_path):
    """Of targets of unequal length, however they are batched; with its KL terms."""
    model = tiny_model(tau_sigma=0.5, tau_alpha=1.0)
    trainer = trainer_of(NvibTrainer, model, tmp_path, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    expected = metrics["eval_cross_entropy"] + 0.2 * metrics["eval_kl_gaussian"] + 0.3 * metrics["eval_kl_dirichlet"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss"] > metrics["eval_cross_entropy"] + 0.2


def test_plain_model_under_the_same_trainer(tmp_path):
    """It trains, and its loss in evaluation is the mean over all tokens, to be compared with an NVIB model's."""
    model = tiny_base("bart")
    trainer = trainer_of(NvibTrainer, model, tmp_path / "plain", max_steps=1, per_device_eval_batch_size=2)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    inputs = tiny_collator(model)(list(trainer.eval_dataset))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    others = trainer_of(Seq2SeqTrainer, model, tmp_path / "others", per_device_eval_batch_size=2).evaluate()
    assert others["eval_loss"] != pytest.approx(loss, rel=1e-2)  # the mean of the batches' means

    wrapped = NvibForConditionalGeneration.from_base_pretrained(model)
    again = trainer_of(NvibTrainer, wrapped, tmp_path / "wrapped", per_device_eval_batch_size=3).evaluate()
    assert again["eval_loss"] == pytest.approx(loss, rel=1e-4)


def test_loss_of_an_evaluation_is_that_of_the_trainer(tmp_path):
    """Whoever writes a ``compute_loss`` of their own sees it evaluated."""

    class Doubled(NvibTrainer):
        def compute_loss(self, *args, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    model = tiny_model()
    expected, doubled = (
        trainer_of(one, model, tmp_path, per_device_eval_batch_size=2).evaluate()["eval_loss"]
        for one in (NvibTrainer, Doubled)
    )
    assert doubled == pytest.approx(2 * expected, rel=1e-5)


@pytest.mark.parametrize("trainer_class", [Seq2SeqTrainer, NvibTrainer])
def test_predicts_with_generate(trainer_class, tmp_path):
    """What the Trainer generates is what the model generates."""
    model = tiny_model()
    arguments = {"predict_with_generate": True, "generation_max_length": 7, "generation_num_beams": 2}
    trainer = trainer_of(trainer_class, model, tmp_path, per_device_eval_batch_size=5, **arguments)
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {"texts": len(prediction.predictions)}
    metrics = trainer.evaluate()
    assert metrics["eval_texts"] == 5 and metrics["eval_loss"] > 0
    inputs = tiny_collator()(trainer.eval_dataset)
    tokens = model.eval().generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_length=7, num_beams=2
    )
    predictions = torch.as_tensor(seen[0].predictions)
    assert torch.equal(predictions[:, : tokens.shape[1]], tokens)
    assert predictions[:, tokens.shape[1] :].eq(0).all()


def test_predicts_without_labels(tmp_path):
    examples = [{"input_ids": example["input_ids"]} for example in tiny_examples(3)]
    trainer = trainer_of(NvibTrainer, tiny_model(), tmp_path, predict_with_generate=True, generation_max_length=5)
    trainer.data_collator = lambda batch: tiny_tokenizer().pad(batch, return_tensors="pt")
    prediction = trainer.predict(examples)
    assert len(prediction.predictions) == 3 and not any("kl" in name for name in prediction.metrics)


def test_own_loss_sees_the_terms(tmp_path):
    """A Trainer with a loss of its own still logs, and can use, what the model returns."""

    class Doubled(NvibTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            loss = 2 * loss + outputs.kl_gaussian.sum() * 0
            return (loss, outputs) if return_outputs else loss

    logs = []
    for trainer_class in (NvibTrainer, Doubled):
        torch.manual_seed(0)
        trainer = trainer_of(trainer_class, tiny_model(), tmp_path, max_steps=1)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[1]["loss"] == pytest.approx(2 * logs[0]["loss"])
    assert {name: logs[1][name] for name in TERMS} == {name: logs[0][name] for name in TERMS}


def test_second_training_logs_its_own_steps(tmp_path):
    trainer = trainer_of(NvibTrainer, tiny_model(), tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0)
    trainer.train()
    trainer.train_dataset = [{"input_ids": [5, 6, 1], "labels": [5, 6, 1]}] * 8
    trainer.train()
    assert next(entry for entry in trainer.state.log_history if "loss" in entry)["num_vectors"] == 3.0


# ---------------------------------------------------------------------------------------------- refusals, wrappers
def with_adapter(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["nvib"], init_lora_weights=True)
    )


def test_label_smoothing_of_the_trainer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1 .*NvibConfig\(label_smoothing"):
        trainer_of(NvibTrainer, tiny_model(), tmp_path, label_smoothing_factor=0.1)
    plain = trainer_of(Trainer, tiny_model(), tmp_path, label_smoothing_factor=0.1)
    for call in (plain.train, plain.evaluate):
        with pytest.raises(ValueError, match=r"label_smoothing_factor to 0 .*NvibConfig\(label_smoothing"):
            call()


@WITH_COMPILE
@WITH_PEFT
def test_model_is_found_in_its_wrappers():
    model = tiny_model()
    assert find_nvib_model(model) is model
    assert find_nvib_model(torch.nn.DataParallel(model)) is model
    assert find_nvib_model(torch.compile(model)) is model
    assert find_nvib_model(torch.compile(with_adapter(model))) is model
    config_class = type("NvibConfig", (), {"model_type": "nvib"})  # both come with a checkpoint's own code
    downloaded = type("NvibForConditionalGeneration", (torch.nn.Module,), {"config_class": config_class})()
    assert find_nvib_model(torch.nn.Sequential(downloaded)) is downloaded
    with pytest.raises(ValueError, match="Linear contains no NvibForConditionalGeneration"):
        find_nvib_model(torch.nn.Linear(1, 1))


@WITH_PEFT
def test_adapter_trains_and_logs(tmp_path, fixed_draws):
    """Through PEFT the loss is scaled as without: the same log as the bare model's."""
    logs = []
    for adapt in (False, True):
        model = tiny_model(tau_sigma=0.5, tau_alpha=1.0)
        if adapt:
            model = with_adapter(model)
        annealing = KLAnnealingCallback("constant", start_ratio=0.5)
        arguments = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        trainer = trainer_of(NvibTrainer, model, tmp_path, callbacks=[annealing], learning_rate=0.0, **arguments)
        trainer.train()
        logs.append([{name: entry[name] for name in ["loss", *TERMS]} for entry in trainer.state.log_history[:2]])
    for bare, adapted in zip(*logs, strict=True):
        assert adapted == pytest.approx(bare, rel=1e-5)
    assert logs[0][1]["loss"] > logs[0][0]["loss"] + 0.2


@WITH_COMPILE
def test_compiled_model_logs(tmp_path, fixed_draws):
    logs = []
    for compiled in (False, True):
        model = tiny_model()
        arguments = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = trainer_of(NvibTrainer, model, tmp_path, max_steps=1, learning_rate=0.0, **arguments)
        trainer.train()
        logs.append({name: trainer.state.log_history[0][name] for name in ["loss", *TERMS]})
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)


def train_and_evaluate(folder, processes):
    """The logs of two steps of training and of an evaluation, without draws."""
    arguments = {"per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 2, "max_steps": 2}
    if processes > 1:
        arguments["ddp_backend"] = "gloo"
    trainer = trainer_of(NvibTrainer, tiny_model(), folder, learning_rate=0.0, **arguments)
    trainer.eval_dataset = tiny_examples(8, seed=1)
    layer = trainer.model.nvib
    layer.sample_posterior = lambda posterior, generator=None: (posterior.mu, posterior.log_mean_pi(), posterior)
    trainer.train()
    trained = [
        {name: entry[name] for name in ["loss", "grad_norm", *TERMS]} for entry in trainer.state.log_history[:2]
    ]
    evaluated = trainer.evaluate()
    return [*trained, {name: evaluated[f"eval_{name}"] for name in TERMS}]


def one_of_two(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    logs = train_and_evaluate(folder, 2)
    (folder / f"{rank}.json").write_text(json.dumps(logs), encoding="utf-8")


def test_processes_log_as_one(tmp_path):
    """Two processes with half of each batch log, and optimise, what one does with the whole."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (tmp_path, port), nprocs=2)
    expected = train_and_evaluate(tmp_path, 1)
    for rank in range(2):
        logs = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        for two, one in zip(logs, expected, strict=True):
            assert two == pytest.approx(one, rel=1e-4)
