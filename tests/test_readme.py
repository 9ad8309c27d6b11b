"""The code of README and of the examples' pages runs as written, prints what it says, and the links lead somewhere."""

import ast
import contextlib
import copy
import io
import re
from pathlib import Path

import pytest
import torch
from tiny_models import REFUSED, TITLES, tiny_base, tiny_inputs, tiny_labels
from tiny_nvib import tensors, tiny_nvib
from tiny_text import tiny_examples, tiny_tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    BatchEncoding,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Seq2SeqTrainingArguments,
)

from nvib_hf import AttentionSpec, NvibForConditionalGeneration, encode_texts
from nvib_hf.wrapping import specs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
FIRST_LINES, MERGE, TRAIN, EVALUATE = (code for language, code in BLOCKS if language == "python")
EXAMPLES = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
WHISPER, TRANSCRIBE, NEIGHBOURS, INDEX, UNFROZEN, STEERED, UNUSUAL = re.findall(
    r"```python\n(.*?)```", EXAMPLES, flags=re.DOTALL
)
SELF_ATTENTION_PAGE = (ROOT / "examples" / "SELF_ATTENTION.md").read_text(encoding="utf-8")
SELF_ATTENTION = re.findall(r"```python\n(.*?)```", SELF_ATTENTION_PAGE, flags=re.DOTALL)
TEXTS = ["w5 w6 w7", "w8 w9", "w10 w11 w12 w13", "w14 w15 w16"]


def run(code: str, names: dict | None = None) -> str:
    """What the code prints; ``names`` is what it finds, and what it has made afterwards."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {} if names is None else names)
    return printed.getvalue()


def printed_after(code: str) -> str:
    """The text block that follows a block of code."""
    language, text = BLOCKS[BLOCKS.index(("python", code)) + 1]
    assert language == "text"
    return text


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------ the pages
def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, link


def test_the_table_of_architectures_has_the_rows_and_columns_of_its_tests():
    """Its cells are written by ``pytest --architecture-table``."""
    page = (ROOT / "examples" / "ARCHITECTURES.md").read_text(encoding="utf-8")
    header, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*", page, re.M)
    )
    tests = ast.walk(ast.parse((ROOT / "tests" / "wrapping" / "test_architectures.py").read_text(encoding="utf-8")))
    marks = [node for node in tests if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("capability")]
    of_self_attention = {f"{kind}'s self-attention" for kind in REFUSED}
    assert set(header[1:]) == {mark.args[0].value for mark in marks} | of_self_attention
    assert [row[0] for row in rows] == list(TITLES.values())
    assert f"{len(rows)} architectures" in README


# ------------------------------------------------------------------------------------ the blocks
def test_the_first_lines_run_as_they_stand_and_print_what_they_say():
    pytest.importorskip("ot")
    assert run(FIRST_LINES) == printed_after(FIRST_LINES)


def test_a_model_is_trained_saved_pushed_and_unwrapped(folder, monkeypatch):
    """Pushing is only recorded here: tests/test_hub.py pushes to a hub of its own."""
    pushed = []
    for owner in (NvibForConditionalGeneration, PreTrainedTokenizerBase):
        monkeypatch.setattr(owner, "push_to_hub", lambda self, name: pushed.append((type(self).__name__, name)))
    tiny_base("bart").save_pretrained("bart")
    tiny_tokenizer().save_pretrained("bart")
    names = {"dataset": tiny_examples(8), "held_out": tiny_examples(4)}
    assert TRAIN.count('"facebook/bart-base"') == 1
    run(TRAIN.replace("facebook/bart-base", "bart"), names)

    assert pushed == [("NvibForConditionalGeneration", "me/my-nvib"), (type(tiny_tokenizer()).__name__, "me/my-nvib")]
    saved, before = tensors(AutoModelForSeq2SeqLM.from_pretrained("my-nvib")), tensors(tiny_base("bart"))
    for name, tensor in tensors(names["base"]).items():
        assert torch.equal(tensor, saved[f"base.{name}"])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in tensors(names["base"]).items())
    assert (folder / "my-nvib" / "README.md").read_text().count("license: mit") == 1


def test_whisper_learns_what_to_keep_and_nothing_else(folder):
    inputs = {**tiny_inputs("whisper"), "labels": tiny_labels("whisper")}
    names = {
        "whisper": tiny_base("whisper"),
        "accepted": 100.0,
        "args": Seq2SeqTrainingArguments("out", max_steps=12, remove_unused_columns=False, report_to=[]),
        "data": [{name: tensor[row] for name, tensor in inputs.items()} for row in range(3)],
        "collate": lambda rows: {name: torch.stack([row[name] for row in rows]) for name in inputs},
    }
    exec("from nvib_hf import ConstraintCallback, NvibForConditionalGeneration, NvibTrainer", names)
    fresh = tensors(NvibForConditionalGeneration.from_base_pretrained(tiny_base("whisper"), dropping="relaxed"))
    run(WHISPER, names)
    moved = {name for name, x in names["model"].named_parameters() if not torch.equal(x, fresh[name])}
    assert moved and all(name.startswith("nvib.keep_") for name in moved)


class Processor:
    """Hands over features, and says how much comes back."""

    @classmethod
    def from_pretrained(cls, folder: str):
        return cls()

    def __call__(self, sound, sampling_rate: int, return_tensors: str, return_attention_mask: bool = False):
        inputs = BatchEncoding(tiny_inputs("whisper"))
        return inputs if return_attention_mask else BatchEncoding({"input_features": inputs["input_features"]})

    def batch_decode(self, tokens, skip_special_tokens: bool) -> list[str]:
        return [f"{len(row)} tokens" for row in tokens]


def test_whisper_reads_fewer_vectors(folder, monkeypatch):
    tiny_base("whisper").save_pretrained("whisper")
    encoded, encode = [], NvibForConditionalGeneration._encode
    monkeypatch.setattr(
        NvibForConditionalGeneration, "_encode", lambda *args: encoded.append(encode(*args)) or encoded[-1]
    )
    code = MERGE.replace("openai/whisper-tiny.en", "whisper")
    names = {"sound": None, "processor": Processor()}
    run(code, names)
    assert len(names["tokens"]) == len(tiny_inputs("whisper")["input_features"])
    ((read, _),), model = encoded[:1], names["model"]
    expected = model.merge_latents(model.encode(**names["inputs"]), cost=200)
    assert torch.equal((read.log_pi > -torch.inf).sum(-1) - 1, expected.num_vectors.long())


def test_what_whisper_has_learnt_is_loaded_and_transcribes(folder):
    tiny_nvib("whisper").save_pretrained("dropping")
    imports = "from transformers import AutoProcessor\n"
    assert TRANSCRIBE.count(imports) == 1
    printed = run(TRANSCRIBE.replace(imports, ""), {"sound": None, "AutoProcessor": Processor})
    assert printed.count("tokens") == len(tiny_inputs("whisper")["input_features"])


def test_a_text_is_its_own_nearest_neighbour():
    pytest.importorskip("ot")
    names = {"model": tiny_nvib(), "tokenizer": tiny_tokenizer(), "texts": TEXTS}
    run(NEIGHBOURS, names)
    assert names["index"][0, 0] == names["quick"][0] == 0 and names["distance"][0, 0] < 1e-3
    pytest.importorskip("sklearn")
    run(INDEX, names)
    assert names["closest"][0] == 0 and len(names["closest"]) == 2 and len(names["clusters"]) == len(TEXTS)


def test_the_learned_prior_is_trained_with_the_model(folder):
    model, tokenizer = tiny_nvib(lambda_gaussian=1.0), tiny_tokenizer()
    texts = [f"w{5 + i} w{6 + i} w{7 + i}" for i in range(20)]
    latents = encode_texts(model, tokenizer, texts)
    model.fit_latent_prior(latents, latents[:5], sizes={"num_codes": 8, "d_model": 16, "num_layers": 1}, max_steps=2)
    before, rate = copy.deepcopy(model.latent_prior.state_dict()), model.rate(latents).mean().item()
    ids = tokenizer(texts).input_ids
    names = {
        "model": model.train(),
        "tokenizer": tokenizer,
        "texts": texts,
        "held_out": texts,
        "dataset": [{"input_ids": row, "labels": row} for row in ids],
        "collator": DataCollatorForSeq2Seq(tokenizer),
        "args": Seq2SeqTrainingArguments(
            "out", max_steps=40, learning_rate=3e-3, report_to=[], disable_tqdm=True, dataloader_pin_memory=False
        ),
    }
    assert float(re.search(r"[\d.]+", run(UNFROZEN, names))[0]) < rate
    assert all(not torch.equal(before[name], x) for name, x in model.latent_prior.named_parameters())
    assert model.config.latent_prior_frozen
    names = {"model": model, "outputs": model(**tiny_inputs("bart"), labels=tiny_labels("bart"))}
    before = model.kl_beta.clone()
    run(STEERED, names)
    assert torch.equal(model.kl_beta, before * (1.02 if names["outputs"].cross_entropy < 0.8 else 0.98))


def test_a_text_unlike_those_held_out_is_found():
    model, tokenizer = tiny_nvib(), tiny_tokenizer()
    texts = [f"w{5 + i} w{6 + i} w{7 + i}" for i in range(20)]
    latents = encode_texts(model, tokenizer, texts)
    model.fit_latent_prior(latents, latents[:5], sizes={"num_codes": 8, "d_model": 16, "num_layers": 1}, max_steps=2)
    names = {"model": model, "tokenizer": tokenizer, "held_out_texts": texts, "texts": [texts[0], " ".join(texts)]}
    run(UNUSUAL, names)
    scores = names["unusual"](texts)
    assert ((scores > names["threshold"]).sum() == 1) and len(names["found"]) <= 2
    expected = [model.rate(encode_texts(model, tokenizer, [text])).item() / 4 for text in texts]
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_results_go_into_the_model_card(folder):
    pytest.importorskip("ot")
    pytest.importorskip("sacrebleu")
    model = tiny_nvib()
    model.save_pretrained("my-nvib")
    names = {"model": model, "tokenizer": tiny_tokenizer(), "held_out_texts": TEXTS, "training_texts": TEXTS[:2]}
    few = "num_samples=4, num_pairs=2, max_length=8"
    assert EVALUATE.count("training_texts=training_texts)") == 1
    run(EVALUATE.replace("training_texts)", f"training_texts, {few})"), names)
    assert names["results"]["samples"]
    assert "## Evaluation" in (folder / "my-nvib" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("padded", [True, False])
def test_the_plain_pytorch_walk_through_runs_in_every_mode(training, kappa, padded):
    torch.manual_seed(0)
    code = code_of("PLAIN_PYTORCH.md")
    assert "kappa=1" in code and "latent = nvib(" in code
    code = code.replace("kappa=1", f"kappa={kappa}")
    mode = f"for module in (encoder, nvib, decoder):\n    module.train({training})\npadding[1, 7:] = {padded}\n"
    code = code.replace("latent = nvib(", mode + "latent = nvib(")
    names: dict = {}
    run(code, names)

    components = 11 * (kappa if training else 1)
    assert names["latent"]["z"].z.shape == (components, 2, 64)
    assert names["latent"]["memory_key_padding_mask"].any() == padded
    assert names["sampled"].shape == (6, 3, 64) and names["sampled"].isfinite().all()
    for module in ("encoder", "nvib", "decoder"):
        assert all(parameter.grad.isfinite().all() for parameter in names[module].parameters())
    assert all(parameter.grad.any() for parameter in names["nvib"].parameters())


def codes_of(page: str) -> list[str]:
    text = (ROOT / "examples" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def code_of(page: str) -> str:
    [code] = codes_of(page)
    return code


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
def test_an_adapter_is_saved_and_loaded(folder):
    pytest.importorskip("peft")
    names = {"model": tiny_nvib()}
    adapter, _ = codes_of("TOOLS.md")
    run(adapter, names)
    assert any("lora" in name for name in tensors(names["adapter"]))


def test_an_encoder_is_exported():
    names = {"model": tiny_nvib()}
    _, export = codes_of("TOOLS.md")
    run(export, names)
    texts = tuple(tiny_inputs("bart").values())  # of another batch and length
    for actual, expected in zip(
        names["program"].module()(*texts), names["Encoder"](names["model"])(*texts), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_another_architecture_is_a_spec(monkeypatch):
    monkeypatch.setattr(specs, "_REGISTRY", dict(specs._REGISTRY))
    run(code_of("ARCHITECTURES.md"))
    spec = specs._REGISTRY["cross", "MyCrossAttention"]
    assert isinstance(spec, AttentionSpec) and (spec.query, spec.output) == ("query", "dense")


# ------------------------------------------------------------------------------------ NVIB in self-attention
def test_self_attention_by_kind():
    code, _, classifier = SELF_ATTENTION
    names = {}
    text = re.search(r"```text\n(.*?)```", SELF_ATTENTION_PAGE, flags=re.DOTALL)[1]
    assert run(code, names) == text
    run(classifier, names)
    assert names["loss"].requires_grad


def test_the_search_for_taus():
    model_inputs = {**tiny_inputs("bart"), "labels": tiny_labels("bart")}
    names = {
        "whisper": tiny_base("bart"),
        "clean_batches": [model_inputs],
        "word_error": lambda model: model(**model_inputs).cross_entropy.item(),
    }
    run(SELF_ATTENTION[1], names)
    assert len(names["trials"]) == 12
