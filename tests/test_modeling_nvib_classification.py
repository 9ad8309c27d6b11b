"""Encoders with a head: classification of texts, tokens, images and sounds with NVIB in the self-attentions."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from tiny_models import BERT_LIKE, ROBERTA_LIKE, _draw_weights, tiny_base
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from nvib_hf import KLAnnealingCallback, NvibConfig, NvibForSequenceClassification, NvibForTokenClassification
from nvib_hf.wrapping.self_attention import DenoisingSelfAttention, current_pass
from nvib_hf.wrapping.specs import find_self_attention

BERT = {**BERT_LIKE, "num_labels": 3}
NARROW = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_labels": 3,
}
DISTILBERT = {"vocab_size": 99, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "num_labels": 3}
CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
}
NO_DROPOUT = {
    "distilbert": {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
    "wav2vec2": {"hidden_dropout": 0.0, "final_dropout": 0.0, "feat_proj_dropout": 0.0, "attention_dropout": 0.0}
    | {"layerdrop": 0.0, "mask_time_prob": 0.0},
}
MAKE = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**{**ROBERTA_LIKE, "num_labels": 3})),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**BERT, embedding_size=16)),
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(**DISTILBERT, **NO_DROPOUT["distilbert"])
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(**NARROW, image_size=8, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "wav2vec2": lambda: Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(**NARROW, **CONVOLUTIONS, **NO_DROPOUT["wav2vec2"])
    ),
    "bert_tokens": lambda: BertForTokenClassification(BertConfig(**BERT)),
}
over_models = pytest.mark.parametrize("kind", MAKE)


def base_of(kind):
    torch.manual_seed(0)
    model = MAKE[kind]()
    _draw_weights(model, 0.3)
    return model.eval()


def class_of(kind):
    return NvibForTokenClassification if kind == "bert_tokens" else NvibForSequenceClassification


def wrap(kind, base=None, **settings):
    return class_of(kind).from_base_pretrained(base_of(kind) if base is None else base, **settings)


def inputs_of(kind):
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    if kind == "wav2vec2":
        return {"input_values": torch.randn(3, 80, generator=generator)}
    ids = torch.randint(3, 99, (3, 7), generator=generator)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def labels_of(kind):
    if kind == "bert_tokens":
        return torch.randint(0, 3, (3, 7), generator=torch.Generator().manual_seed(2))
    return torch.tensor([0, 1, 2])


def logits_of(model, kind):
    with torch.no_grad():
        return model(**inputs_of(kind)).logits


# ------------------------------------------------------------------------------------------------- the function
@over_models
def test_a_fresh_wrap_computes_the_base(kind):
    base = base_of(kind)
    expected = logits_of(base, kind)
    for evaluation in ("means", "mixture"):
        model = wrap(kind, copy.deepcopy(base), evaluation=evaluation)
        assert list(model.nvib_layers()) == ["encoder.0", "encoder.1"]
        torch.testing.assert_close(logits_of(model, kind), expected, atol=1e-3, rtol=0)
    for module, _ in find_self_attention(base, "encoder"):
        module.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]), *output[1:]))
    assert (logits_of(base, kind) - expected).abs().max() > 0.1  # or the above would prove nothing


@over_models
def test_the_loss_is_the_head_s_and_the_weighted_divergences(kind):
    model = wrap(kind, tau_alpha=1.0, tau_sigma=0.5, lambda_gaussian=0.3, lambda_dirichlet=0.2)
    inputs, labels, given = inputs_of(kind), labels_of(kind), {}
    for name, layer in model.nvib_layers().items():
        layer.register_forward_pre_hook(lambda m, args, name=name: given.__setitem__(name, args[0]))
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        plain = model.base(**inputs, labels=labels)
    torch.testing.assert_close(output.cross_entropy, plain.loss)
    padding = inputs["attention_mask"] == 0 if "attention_mask" in inputs else None
    divergences = []
    for name, layer in model.nvib_layers().items():
        posterior = layer.posterior(given[name], padding)
        divergences.append(torch.stack(layer.kl(posterior, posterior, 1)))
    gaussian, dirichlet = torch.stack(divergences).mean(0)
    torch.testing.assert_close(output.kl_gaussian, gaussian)
    torch.testing.assert_close(output.kl_dirichlet, dirichlet)
    torch.testing.assert_close(output.loss, plain.loss + 0.3 * gaussian.mean() + 0.2 * dirichlet.mean())


@over_models
def test_every_layer_learns(kind):
    model = wrap(kind, tau_alpha=1.0, tau_sigma=0.5, lambda_gaussian=0.1, lambda_dirichlet=0.1).train()
    model(**inputs_of(kind), labels=labels_of(kind)).loss.backward()
    for name, layer in model.nvib_layers().items():
        for parameter_name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (name, parameter_name)


def test_what_a_layer_drops_is_gone_from_those_above():
    model = wrap("bert", alpha_threshold=1.0, accumulate_alpha=True)
    with torch.no_grad():
        for layer in model.nvib_layers().values():
            layer.alpha_quadratic.zero_()
            layer.alpha_weight.normal_(std=0.3)
            layer.alpha_bias.fill_(0.3)
        output = model(**inputs_of("bert"), labels=labels_of("bert"))
    shares = output.layer_prop_vectors
    assert (shares["encoder.1"] <= shares["encoder.0"]).all() and shares["encoder.0"].mean() < 1
    assert current_pass() is None


# ------------------------------------------------------------------------------------------------- the model
@over_models
def test_saved_and_loaded(kind, tmp_path):
    model = wrap(kind, tau_alpha=1.0, tau_sigma=0.3)
    model.save_pretrained(tmp_path)
    auto = AutoModelForTokenClassification if kind == "bert_tokens" else AutoModelForSequenceClassification
    auto = AutoModelForImageClassification if kind == "vit" else auto
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is class_of(kind) and loaded.config.num_labels == 3
    assert torch.equal(logits_of(loaded, kind), logits_of(model, kind))


def test_from_a_path(tmp_path):
    base_of("electra").save_pretrained(tmp_path)
    model = NvibForSequenceClassification.from_base_pretrained(str(tmp_path), lambda_gaussian=0.1).eval()
    assert type(model.base) is ElectraForSequenceClassification
    torch.testing.assert_close(
        logits_of(model, "electra"), logits_of(base_of("electra"), "electra"), atol=1e-3, rtol=0
    )


def test_names_stay_and_unwrapping_gives_the_base_back():
    base = base_of("bert")
    names = set(base.state_dict())
    model = wrap("bert", base)
    assert names <= set(model.base.state_dict())
    unwrapped = model.unwrap()
    assert set(unwrapped.state_dict()) == names
    assert not any(isinstance(module, DenoisingSelfAttention) for module in unwrapped.modules())
    assert torch.equal(logits_of(unwrapped, "bert"), logits_of(base_of("bert"), "bert"))


@pytest.mark.parametrize(
    ("kind", "auto"), [("bert", "AutoModelForSequenceClassification"), ("vit", "AutoModelForImageClassification")]
)
def test_code_from_a_folder_needs_no_package(kind, auto, tmp_path):
    """As from the hub, in a process that cannot import nvib_hf."""
    model = wrap(kind, tau_alpha=1.0)
    model.save_pretrained(tmp_path / "model")
    torch.save({"inputs": inputs_of(kind), "logits": logits_of(model, kind)}, tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["nvib_hf"] = None
import torch
from transformers import {auto}
model = {auto}.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True).eval()
expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    torch.testing.assert_close(model(**expected["inputs"]).logits, expected["logits"])
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]


def test_labels_are_those_of_the_base(tmp_path):
    """Set on a live model, saved, and given when loading, as of the base."""
    model, names = wrap("bert"), {0: "bad", 1: "fair", 2: "good"}
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    assert model.base.config.id2label == names
    model.save_pretrained(tmp_path)
    loaded = NvibForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == loaded.base.config.id2label == names
    given = {"num_labels": 5, "problem_type": "multi_label_classification"}
    loaded = NvibForSequenceClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **given).eval()
    assert logits_of(loaded, "bert").shape == (3, 5)
    assert loaded.config.num_labels == 5 and loaded.base.config.problem_type == "multi_label_classification"


def test_a_live_kind_of_problem_counts():
    model = wrap("bert").eval()
    model.config.problem_type = "regression"
    target = torch.arange(9.0).view(3, 3)
    output = model(**inputs_of("bert"), labels=target)
    torch.testing.assert_close(output.cross_entropy, (output.logits - target).square().mean())


def test_a_training_whose_loss_has_no_divergences_is_warned_of(monkeypatch):
    """A Trainer's label smoothing takes the labels away."""
    said = []
    monkeypatch.setattr("nvib_hf.modeling_nvib_classification.logger.warning_once", said.append)
    for weight in (0.0, 0.01):
        model = wrap("bert", lambda_gaussian=weight, lambda_dirichlet=weight)
        for mode in (model.eval, model.train):
            mode()(**inputs_of("bert"))
        model.train()(**inputs_of("bert"), labels=labels_of("bert"))
    assert len(said) == 1 and "label_smoothing_factor" in said[0]


def test_layer_drop_skips_layers():
    """A layer that does not run costs nothing; where none does, the loss is the head's."""
    model = wrap("wav2vec2", attentions={"encoder": [1]}, lambda_gaussian=0.1, lambda_dirichlet=0.1).train()
    for layerdrop, cost in ((0.0, True), (1.0, False)):
        model.base.config.layerdrop = layerdrop
        output = model(**inputs_of("wav2vec2"), labels=labels_of("wav2vec2"))
        output.loss.backward()
        assert (output.loss > output.cross_entropy).item() == cost
        assert (output.kl_gaussian is not None) == cost


def test_the_plain_trainer_fine_tunes_it(tmp_path):
    model = wrap("bert", lambda_gaussian=0.01, lambda_dirichlet=0.01)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = {"input_ids": [[5, 6, 7, 8]] * 8, "attention_mask": [[1] * 4] * 8, "labels": [0, 1] * 4}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    callback = KLAnnealingCallback(warmup_ratio=1.0)
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict(rows), callbacks=[callback])
    trainer.train()
    assert model.kl_beta[0] == pytest.approx(2 / 3)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any("nvib.mu_logvar" in name for name in changed)
    assert math.isfinite(trainer.evaluate(Dataset.from_dict(rows))["eval_loss"])


def test_gradient_accumulation_is_one_large_batch():
    """Of equal micro-batches, as the Trainer does it: their losses are divided by their number."""
    model = wrap("bert", lambda_gaussian=0.1).train()
    model.eval()  # no draws
    inputs, labels = inputs_of("bert"), labels_of("bert")
    whole = model(**inputs, labels=labels).loss
    parts = [model(**{n: x[i : i + 1] for n, x in inputs.items()}, labels=labels[i : i + 1]).loss for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_priors_and_taus():
    model = wrap("bert", evaluation="mixture")
    expected = logits_of(model, "bert")
    priors = model.fit_prior([{**inputs_of("bert"), "labels": labels_of("bert")}])
    assert set(priors) == {"encoder.0", "encoder.1"}
    model.set_taus(tau_alpha=20.0)
    torch.testing.assert_close(logits_of(model, "bert"), expected, atol=1e-3, rtol=0)
    model.set_taus(tau_alpha={"encoder": -2.0}, tau_sigma=0.3)
    assert (logits_of(model, "bert") - expected).abs().max() > 0.01


# ------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("attentions", [["cross", "encoder"], ["decoder"]])
def test_attentions_that_it_does_not_have_are_refused(attentions):
    base = base_of("bert")
    with pytest.raises(ValueError, match="'encoder' only"):
        wrap("bert", base, attentions=attentions)
    assert not any(isinstance(module, DenoisingSelfAttention) for module in base.modules())


def test_a_model_without_such_a_head_is_refused():
    with pytest.raises(ValueError, match="'m2m_100' has no head of this kind"):
        NvibForSequenceClassification(NvibConfig(base_config=tiny_base("m2m_100").config))


def test_a_wrapped_model_is_refused():
    model = wrap("bert")
    with pytest.raises(ValueError, match="NVIB model already, or part of one"):
        wrap("bert", model.base)


@torch.no_grad()
@over_models
def test_an_unknown_argument_is_named(kind):
    model, inputs = wrap(kind).eval(), inputs_of(kind)
    name = next(iter(inputs))
    for given, says in (
        ({f"{name[:-1]}z": inputs[name]}, f"takes no argument '{name[:-1]}z'. Did you mean '{name}'"),
        ({**inputs, "atention_mask": None, "attention_maks": 1}, "Did you mean 'attention_mask'"),
        ({**inputs, "merge_share": 0.5}, "takes no argument 'merge_share'. Leave it out"),
        ({**inputs, "cu_seq_lens_q": torch.tensor([0, 3])}, "takes no argument 'cu_seq_lens_q'"),
    ):
        with pytest.raises(TypeError, match=says):
            model(**given)
    output = model(**inputs, output_hidden_states=True, output_attentions=False, return_dict=True, no_such=None)
    assert len(output.hidden_states) == 3 and output.attentions is None


class OwnBert(BertForSequenceClassification):
    """A base of one's own reads what it likes."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids)
        output.logits = output.logits * kwargs.get("temperature", 1)
        return output


@torch.no_grad()
def test_a_base_of_ones_own_may_read_any_argument():
    model = NvibForSequenceClassification.from_base_pretrained(OwnBert(BertConfig(**BERT))).eval()
    ids = inputs_of("bert")["input_ids"]
    torch.testing.assert_close(model(input_ids=ids, temperature=2).logits, 2 * model(input_ids=ids).logits)


@torch.no_grad()
def test_arguments_that_the_encoder_reads_are_handed_on():
    base = base_of("vit")
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    expected = base(pixel_values=images, interpolate_pos_encoding=True).logits
    found = wrap("vit", base).eval()(pixel_values=images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    base, inputs = base_of("bert"), inputs_of("bert")
    places = torch.arange(7).flip(0).expand(3, -1)
    expected = base(**inputs, position_ids=places).logits
    torch.testing.assert_close(
        wrap("bert", base).eval()(**inputs, position_ids=places).logits, expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("settings", [{"merge_share": 0.5}, {"encode_sound_only": True}], ids=str)
def test_what_is_about_a_decoder_is_refused(settings):
    says = "changes what a decoder reads, but an encoder with a head has no decoder"
    with pytest.raises(ValueError, match=says):
        NvibForSequenceClassification.from_base_pretrained(
            BertForSequenceClassification(BertConfig(**BERT)), **settings
        )
    model = wrap("bert").eval()
    for name, value in settings.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=says):
        model(**inputs_of("bert"))
