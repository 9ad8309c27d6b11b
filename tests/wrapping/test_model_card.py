"""The model card is tested like code: what it says is true of the model, and its snippet runs."""

import ast
import re

import numpy as np
import pytest
import torch
import yaml
from tiny_models import EOS, PAD, START, tiny_base
from tiny_nvib import add_adapter_or_skip
from tiny_text import tiny_collator, tiny_examples, tiny_tokenizer
from transformers import (
    Seq2SeqTrainingArguments,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from nvib_hf import NvibForConditionalGeneration, NvibTrainer, add_to_model_card, evaluation_section
from nvib_hf.wrapping.model_card import base_ids, model_card


def wrap(family="bart", names=("",), overrides=None, **settings):
    """A wrapped tiny model whose base, or encoder and decoder, come from the repositories ``names``."""
    model = NvibForConditionalGeneration.from_base_pretrained(tiny_base(family, **(overrides or {})), **settings)
    config = model.base.config
    parts = [config] if len(names) == 1 else [config.encoder, config.decoder]
    for part, name in zip(parts, names, strict=True):
        part.name_or_path = name
    return model


def read(card):
    """A card's header and text."""
    _, header, text = str(card).split("---\n", 2)
    return yaml.safe_load(header), text


def rows(text):
    """The cells of all tables, by the first of their row."""
    found = re.findall(r"^\| *`?(\w+)`? *\|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


# ---------------------------------------------------------------------------------------------- what it says
@pytest.mark.parametrize(
    ("family", "names", "ids", "said"),
    [
        ("bart", ["facebook/bart-base"], ["facebook/bart-base"], "BartForConditionalGeneration"),
        ("t5", ["t5-small"], ["t5-small"], "T5ForConditionalGeneration"),
        ("bart", [""], None, "A `BartForConditionalGeneration`"),
        ("bart", ["/home/someone/bart"], None, "A `BartForConditionalGeneration`"),
        ("bert2gpt2", ["org/bert", "gpt2"], ["org/bert", "gpt2"], "(`EncoderDecoderModel` of `bert` and `gpt2`)"),
        ("bert2gpt2", ["org/bert", ""], ["org/bert"], "(`EncoderDecoderModel` of `bert` and `gpt2`)"),
    ],
)
def test_names_the_base(family, names, ids, said):
    model = wrap(family, names)
    header, text = read(model_card(model, "someone/model"))
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["nvib"]}
    assert header == expected | ({"base_model": ids} if ids else {})
    assert said in text and text.strip().startswith("# model\n")
    for name in ids or []:
        assert f"[{name}](https://huggingface.co/{name})" in text
    assert "/home" not in text


def test_folder_is_no_base(tmp_path, monkeypatch):
    """A folder whose name could be a repository's."""
    monkeypatch.chdir(tmp_path)
    tiny_base("bart").save_pretrained("runs/bart")
    assert base_ids(NvibForConditionalGeneration.from_base_pretrained("runs/bart").config) == []


@pytest.mark.parametrize(
    ("family", "task"),
    [
        ("whisper", "automatic-speech-recognition"),
        ("wav2vec2_to_bert", "automatic-speech-recognition"),
        ("vit2gpt2", "image-to-text"),
        ("t5", "text-generation"),
        ("bert2gpt2", "text-generation"),
        ("pop2piano", "text-generation"),
        ("marian", "translation"),
        ("m2m_100", "translation"),
        ("fsmt", "translation"),
        ("nllb_moe", "translation"),
    ],
)
def test_names_the_task(family, task):
    assert read(model_card(wrap(family), "model"))[0]["pipeline_tag"] == task


def test_settings_are_those_of_the_configuration():
    settings = {
        "attentions": {"cross": "all", "decoder": [1]},
        "accumulate_alpha": False,
        "prior_mu": 0.5,
        "prior_var": 2.0,
        "prior_alpha": 3.0,
        "delta": 0.25,
        "kappa": 4,
        "alpha_activation": "relu",
        "dropping": "threshold",
        "alpha_threshold": 0.125,
        "dropping_share": 0.875,
        "tau_alpha": 5.0,
        "tau_sigma": 0.75,
        "tau_mu": 0.5,
        "lambda_gaussian": 0.0625,
        "lambda_dirichlet": 7.5,
        "lambda_vectors": 0.75,
        "free_bits_gaussian": 0.3125,
        "free_bits_dirichlet": 0.4375,
        "word_dropout": 0.1875,
        "word_dropout_token_id": 3,
        "label_smoothing": 0.375,
        "evaluation": "mixture",
        "kl_weights": "pseudo_counts",
        "exact_attention": True,
        "merge_share": 0.5,
        "training_merge_share": 0.625,
    }
    found = rows(read(model_card(wrap(**settings), "model"))[1])
    found.pop("setting", None)
    assert found.pop("encode_sound_only") == ["`False`"]  # of Whisper alone
    assert float(found.pop("merge_cost")[0].strip("`")) == 0  # or a share
    assert set(found) == set(settings)
    for name, value in settings.items():
        said = found[name][0].strip("`")
        assert said == repr(value) or float(said) == value, name


def test_whether_a_learned_prior_is_frozen():
    found = rows(read(model_card(wrap(latent_prior={"num_codes": 8}), "model"))[1])
    assert found["latent_prior_frozen"] == ["`True`"] and "'num_codes': 8" in found["latent_prior"][0]


@pytest.mark.parametrize(
    ("attentions", "said"),
    [
        (None, "between encoder and decoder."),
        (["cross", "encoder"], "between encoder and decoder, and in the encoder's self-attention (all layers)."),
        (
            {"cross": "all", "encoder": "all", "decoder": [0, 1]},
            "and in the encoder's self-attention (all layers) and the decoder's self-attention (layers 0, 1).",
        ),
    ],
)
def test_says_in_which_attentions_it_is(attentions, said):
    _, text = read(model_card(wrap(attentions=attentions), "model"))
    assert f"{said}\n" in text


def test_settings_show_a_prior_that_was_fitted():
    model = wrap()
    mean, variance = torch.linspace(-1, 2, 32), torch.full((32,), 4.0)
    model.nvib.set_prior(mean, variance, 30.0)
    found = rows(read(model_card(model, "model"))[1])
    assert found["prior_mu"] == ["32 values, `-1` to `2`"]
    assert found["prior_var"] == ["`4`"] and found["prior_alpha"] == ["exp(`30`)"]


def test_extra_metadata_stands_in_the_header():
    model = wrap()
    model.add_model_tags("mine")
    header, text = read(model_card(model, "model", "It was trained.", license="mit", tags=["theirs"], datasets=None))
    assert header["license"] == "mit" and header["tags"] == ["nvib", "mine", "theirs"] and "datasets" not in header
    assert "## Training\n\nIt was trained.\n" in text
    assert read(model_card(wrap(), "model"))[0]["tags"] == ["nvib"]  # another model's tags are its own


def test_license_is_what_the_user_says(tmp_path):
    model = wrap()
    assert "license" not in read(model_card(model, "model"))[0]
    model.card_metadata = {"license": "mit", "language": "en"}
    model.save_pretrained(tmp_path)
    header, text = read((tmp_path / "README.md").read_text())
    assert (header["license"], header["language"]) == ("mit", "en")
    assert read(model_card(model, "model", license="gpl-3.0"))[0]["license"] == "gpl-3.0"
    assert "pypi" not in text and "pip install" not in text  # until there is an address


def test_the_address_is_one_constant(monkeypatch):
    monkeypatch.setattr("nvib_hf.wrapping.model_card.ADDRESS", "https://example.org/nvib_hf")
    assert "is installed (`pip install git+https://example.org/nvib_hf`) and" in str(model_card(wrap(), "model"))


NAMES = ['with "quotes"', "two\nlines", "a `tick`", "```python", "# [x](y) <b>", "C:\\new", "{name}", "äöü 中"]


@pytest.mark.parametrize("name", NAMES)
def test_names_reach_neither_heading_nor_code_unescaped(name):
    _, text = read(model_card(wrap(), name))
    heading, snippet = text.strip().split("\n")[0], re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1]
    assert heading.startswith("# ") and not re.search(r"(?<!\\)[`<\[]", heading[2:])
    loaded = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call) and node.keywords]
    named = {call.args[0].value for call in loaded if getattr(call.func, "attr", "") == "from_pretrained"}
    assert named == {name}
    assert "## Settings" in text.split("```")[2]


def test_names_of_decodings_are_escaped():
    """In every table and heading of an evaluation: a pipe would begin a cell."""
    name = "a|b\n`c` [d](e)"
    section = evaluation_section(
        {
            "settings": {"texts": 7, "seed": 0},
            "reconstruction": {"exact_match": 0.5},
            "samples": {name: {"distinct_1": 0.5, "examples": ["x"]}},
            "interpolation": {name: {"example": ["x", "y"], "fluency": [1.0, 2.0]}},
        }
    )
    assert name not in section and r"a\|b \`c\` \[d\](e)" in section and "\n`c`" not in section


@pytest.mark.parametrize("tags", ["abc", ["abc"], ("abc",)])
def test_one_tag_is_one_tag(tags):
    model = wrap()
    model.card_metadata = {"tags": tags}
    assert read(model_card(model, "model"))[0]["tags"] == ["nvib", "abc"]


@pytest.mark.parametrize("wrong", [torch.ones(2), torch.tensor(1.0), np.float64(1), object(), {"a": [torch.ones(1)]}])
def test_what_yaml_cannot_hold_is_refused(wrong):
    model = wrap()
    model.card_metadata = {"metrics": wrong}
    with pytest.raises(TypeError, match=r"model card's metrics must be text, a number, or lists and dicts"):
        model_card(model, "model")


@pytest.mark.parametrize("wrong", [3, [1, 2], {"a": 1}])
def test_tags_are_texts(wrong):
    with pytest.raises(TypeError, match="model card's tags must be a list of texts, but got"):
        model_card(wrap(), "model", tags=wrong)


# ---------------------------------------------------------------------------------------------- when it is written
def test_is_written_with_the_model_once(tmp_path):
    folder = tmp_path / "my_model"
    model = wrap()
    model.save_pretrained(folder)
    header, text = read((folder / "README.md").read_text())
    assert (
        header["tags"] == ["nvib"]
        and 'from_pretrained("my_model", trust_remote_code=True)' in text
        and str(tmp_path) not in text
    )
    (folder / "README.md").write_text("By hand.")
    model.save_pretrained(str(folder))
    assert (folder / "README.md").read_text() == "By hand."


def test_is_written_by_the_main_process(tmp_path):
    wrap().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "README.md").exists()


def test_is_not_written_beside_an_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = wrap()
    add_adapter_or_skip(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "README.md").exists()


# ---------------------------------------------------------------------------------------------- the snippet
PROCESSORS = {
    "whisper": lambda: WhisperFeatureExtractor(feature_size=8, chunk_length=1),
    "wav2vec2_to_bert": Wav2Vec2FeatureExtractor,
    "vit2gpt2": lambda: ViTImageProcessorPil(size={"height": 12, "width": 12}),
}
OVERRIDES = {"whisper": {"max_source_positions": 50}}


@pytest.mark.parametrize("family", ["bart", "t5", "bert2gpt2", *PROCESSORS])
def test_snippet_runs(family, tmp_path, monkeypatch, capsys):
    """On the saved folder, from where that is. (With the code that was saved, in a fresh process: see test_hub.)"""
    monkeypatch.chdir(tmp_path)
    model = wrap(family, overrides=OVERRIDES.get(family))
    for config in (model.generation_config, model.config):
        config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = PAD, EOS, START
    model.save_pretrained("my_model")
    tiny_tokenizer().save_pretrained("my_model")
    if family in PROCESSORS:
        PROCESSORS[family]().save_pretrained("my_model")
    snippet = re.search(r"```python\n(.*?)```", (tmp_path / "my_model" / "README.md").read_text(), re.DOTALL)[1]
    scope = {}
    exec(snippet, scope)
    latents = model.eval().encode(**scope["inputs"])
    torch.testing.assert_close(scope["latents"].z, latents.z)
    tokens = model.generate(encoder_outputs=latents, max_new_tokens=32)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(tiny_tokenizer().batch_decode(tokens, skip_special_tokens=True))
    assert printed[1] == printed[0] and len(printed) == 4  # generate() of the inputs and of their latents


# ---------------------------------------------------------------------------------------------- after training
def trained(folder, model=None, **arguments):
    arguments = Seq2SeqTrainingArguments(
        str(folder),
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=0.0,
        **arguments,
    )
    trainer = NvibTrainer(
        model or wrap(names=["someone/base"], lambda_gaussian=0.5),
        arguments,
        train_dataset=tiny_examples(4),
        eval_dataset=tiny_examples(4, seed=1),
        data_collator=tiny_collator(),
    )
    trainer.train()
    return trainer


def test_an_evaluation_stays_in_the_card(tmp_path):
    """That was put there before the Trainer writes a card of its own, as when it pushes."""
    trainer = trained(tmp_path / "out")
    trainer.save_model()
    add_to_model_card(tmp_path / "out", {"settings": {"texts": 7, "seed": 0}, "reconstruction": {"exact_match": 0.5}})
    before = (tmp_path / "out" / "README.md").read_text()
    trainer.create_model_card()
    after = (tmp_path / "out" / "README.md").read_text()
    section = before[before.index("## Evaluation") : before.index("## Citation")]
    assert section in after and "## Training" in after and after.count("## Evaluation") == 1


def test_training_stands_in_the_card(tmp_path):
    trainer = trained(tmp_path / "out", eval_strategy="steps", eval_steps=1)
    metrics = trainer.evaluate()
    trainer.create_model_card(dataset=["One", "Two"], license="mit", tags="theirs")
    header, text = read((tmp_path / "out" / "README.md").read_text())
    assert header["base_model"] == ["someone/base"] and header["license"] == "mit" and "model-index" not in header
    assert header["tags"] == ["nvib", "theirs", "generated_from_trainer"]
    assert "2 steps on One and Two. At the end:" in text and "- `learning_rate`: 0.0" in text
    found = rows(text)
    logged = trainer.state.log_history
    last = next(entry for entry in reversed(logged) if "loss" in entry)
    for name in ("loss", "cross_entropy", "kl_gaussian", "kl_dirichlet", "num_vectors", "prop_vectors"):
        assert [float(cell) for cell in found[name]] == pytest.approx([last[name], metrics[f"eval_{name}"]], abs=6e-5)
    assert {"1", "2"} <= set(found)  # the evaluations by step


def test_training_without_evaluation_or_data(tmp_path):
    trainer = trained(tmp_path / "out")
    trainer.create_model_card(finetuned_from="someone/else")
    header, text = read((tmp_path / "out" / "README.md").read_text())
    assert header["base_model"] == "someone/else"
    assert "2 steps. At the end:" in text and "Evaluations" not in text and "None" not in text
    assert rows(text)["kl_gaussian"][1] == ""


def test_results_on_known_data_stand_in_the_header(tmp_path):
    """What the Hub lists: the Trainer's own rule, for metrics that it knows."""
    trainer = trained(tmp_path / "out")
    trainer.compute_metrics = lambda prediction: {"accuracy": 0.75}
    trainer.evaluate()
    trainer.create_model_card(tasks="text-generation", dataset_tags="glue", dataset="GLUE", dataset_args="default")
    header, _ = read((tmp_path / "out" / "README.md").read_text())
    (result,) = header["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 0.75 and header["datasets"] == ["glue"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by PEFT
def test_card_of_an_adapter_is_its_own(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["nvib"])
    trained(tmp_path / "out", peft.get_peft_model(wrap(), lora)).create_model_card()
    assert "## Training procedure" in (tmp_path / "out" / "README.md").read_text()
