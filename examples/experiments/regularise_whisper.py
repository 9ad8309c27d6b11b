"""Whisper regularised without training: NVIB in all its attentions, tuned on one kind of noise, tested on others.

    python examples/experiments/regularise_whisper.py          # about half an hour of one CPU core
    python examples/experiments/regularise_whisper.py --quick  # everything runs, nothing is found out

The setting of Fehr & Henderson (COLM 2024) on speech: empirical priors of every layer from clean speech, then a search
for the taus on utterances with white noise of two voices. Tested on sentences and voices that were seen in neither, in
other noise, reverberation and at another speed. Needs flite or espeak-ng (apt-get install flite) and the extras
`examples` and `search`.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the examples

import numpy as np
import torch
from runner import parser, run_all, table_of_rows, write_report
from scipy.signal import fftconvolve, resample_poly
from speech import RATE, Utterance, spoken, with_noise
from transformers import GenerationMixin
from whisper import BATCH, TOKENS_PER_SECOND
from whisper_base import load_packaged_whisper
from word_errors import compare, word_errors

from nvib_hf import NvibForConditionalGeneration, search_taus

FULL = {"prior": 16, "tuning": 24, "test": 48, "trials": 12, "conditions": None}
QUICK = {"prior": 2, "tuning": 2, "test": 2, "trials": 2, "conditions": ["clean", "babble, 5 dB"]}
METHODS = {"whisper": None}
TUNED_ON = "white noise, 5 dB"


# ------------------------------------------------------------------------------------------------ sounds
def mixed(utterances: list[Utterance], noise: list[np.ndarray], decibels: float) -> list[Utterance]:
    """Other sound over each utterance, so far below its mean power."""
    made = []
    for utterance, other in zip(utterances, noise, strict=True):
        other = np.resize(other, len(utterance.sound))
        power = np.square(utterance.sound).mean() / 10 ** (decibels / 10)
        made.append(replace(utterance, sound=utterance.sound + other * np.sqrt(power / np.square(other).mean())))
    return [replace(utterance, sound=utterance.sound.astype(np.float32)) for utterance in made]


def babble(utterances: list[Utterance]) -> list[np.ndarray]:
    """For each utterance four others at once."""
    count = len(utterances)
    made = []
    for i in range(count):
        others = [utterances[(i + shift) % count].sound for shift in range(1, 5)]
        length = max(map(len, others))
        made.append(sum(np.resize(other, length) for other in others))
    return made


def pink(utterances: list[Utterance], seed: int) -> list[np.ndarray]:
    """Noise whose power falls with the frequency."""
    draws = np.random.default_rng(seed)
    made = []
    for utterance in utterances:
        spectrum = np.fft.rfft(draws.normal(size=len(utterance.sound)))
        made.append(np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), len(utterance.sound)))
    return made


def reverberated(utterances: list[Utterance], seconds: float, seed: int) -> list[Utterance]:
    """In a room whose echo has fallen by 60 dB after so many seconds."""
    draws, made = np.random.default_rng(seed), []
    length = int(seconds * RATE)
    for utterance in utterances:
        echo = draws.normal(size=length) * 10 ** (-3 * np.arange(length) / length)
        echo[0] = np.linalg.norm(echo)  # the direct sound is as strong as all of its echoes
        sound = fftconvolve(utterance.sound, echo)[: len(utterance.sound)]
        made.append(replace(utterance, sound=(sound / np.abs(sound).max()).astype(np.float32)))
    return made


def at_speed(utterances: list[Utterance], percent: int) -> list[Utterance]:
    """Played faster, and higher."""
    return [replace(u, sound=resample_poly(u.sound, 100, percent).astype(np.float32)) for u in utterances]


CONDITIONS = {
    "clean": lambda utterances: utterances,
    "white noise, 10 dB": lambda utterances: with_noise(utterances, 10, seed=1),
    TUNED_ON: lambda utterances: with_noise(utterances, 5, seed=1),
    "white noise, 0 dB": lambda utterances: with_noise(utterances, 0, seed=1),
    "pink noise, 5 dB": lambda utterances: mixed(utterances, pink(utterances, seed=1), 5),
    "babble, 5 dB": lambda utterances: mixed(utterances, babble(utterances), 5),
    "reverberation, 0.8 s": lambda utterances: reverberated(utterances, 0.8, seed=1),
    "speed 130 %": lambda utterances: at_speed(utterances, 130),
}


# ------------------------------------------------------------------------------------------------ one run
def features(processor, utterances: list[Utterance]) -> torch.Tensor:
    sounds = [utterance.sound for utterance in utterances]
    return processor(sounds, sampling_rate=RATE, return_tensors="pt").input_features


@torch.no_grad()
def transcribe(model, processor, utterances: list[Utterance]) -> list[str]:
    """By plain greedy generation, with Whisper's prompt."""
    prompt, texts = torch.tensor([processor.tokenizer.prefix_tokens]), []
    for i in range(0, len(utterances), BATCH):
        batch = utterances[i : i + BATCH]
        limit = int(TOKENS_PER_SECOND * max(len(utterance.sound) for utterance in batch) / RATE) + 8
        settings = {"max_new_tokens": limit, "do_sample": False, "num_beams": 1}
        settings["decoder_input_ids"] = prompt.expand(len(batch), -1)
        tokens = GenerationMixin.generate(model, input_features=features(processor, batch), **settings)
        texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return texts


def prior_batches(processor, utterances: list[Utterance], start: int) -> list[dict[str, torch.Tensor]]:
    """Clean speech and its transcripts, one utterance each."""
    made = []
    for utterance in utterances:
        tokens = processor.tokenizer(f" {utterance.text}.").input_ids  # the prompt in front, the end behind
        tokens = [token for token in tokens if token != start]
        made.append({"input_features": features(processor, [utterance]), "labels": torch.tensor([tokens])})
    return made


def one(settings: dict) -> dict:
    """Fit priors, search, and compare in every condition."""
    heard, test = spoken(settings["prior"] + settings["tuning"], settings["test"], settings["seed"])
    plain, processor = load_packaged_whisper()
    tuning = CONDITIONS[TUNED_ON](heard[settings["prior"] :])
    model = NvibForConditionalGeneration.from_base_pretrained(
        load_packaged_whisper()[0], attentions=["cross", "encoder", "decoder"], evaluation="mixture"
    ).eval()
    clean = heard[: settings["prior"]]
    model.fit_prior(prior_batches(processor, clean, plain.config.decoder_start_token_id))

    def word_error(model) -> float:
        errors, words = word_errors([u.text for u in tuning], transcribe(model, processor, tuning))
        return 100 * errors.sum() / words.sum()

    trials = search_taus(model, word_error, settings["trials"], seed=settings["seed"])
    chosen, conditions, shown = settings["conditions"] or list(CONDITIONS), {}, {}
    for name in chosen:
        sounds = CONDITIONS[name](test)
        texts = [transcribe(either, processor, sounds) for either in (plain, model)]
        conditions[name] = compare([utterance.text for utterance in test], *texts)
        shown[name] = [test[0].text, *(some[0] for some in texts)]
    taus = {name: getattr(model.config, name) for name in ("tau_alpha", "tau_sigma")}
    return {"trials": trials, "taus": taus, "conditions": conditions, "shown": shown}


# ------------------------------------------------------------------------------------------------ report
def report(record: dict) -> str:
    settings, results = record["settings"], record["results"]

    def taus_of(trial: dict) -> dict[str, str]:
        return {
            f"`{name}`, {kind}": f"{value:.3g}"
            for name in ("tau_alpha", "tau_sigma")
            for kind, value in trial[name].items()
        }

    best = min(trial["score"] for trial in results["trials"])
    trials = [
        {"word error": f"**{t['score']:.1f}**" if t["score"] == best else f"{t['score']:.1f}", **taus_of(t)}
        for t in results["trials"]
    ]
    rows = [
        {
            "condition": name + (" (tuned on, other voices and sentences)" if name == TUNED_ON else ""),
            "plain, %": f"{row['plain']:.1f}",
            "regularised, %": f"{row['compressed']:.1f}",
            "difference, 95 %": f"{row['difference']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})",
        }
        for name, row in results["conditions"].items()
    ]
    texts = [
        {"condition": name, "said": said, "plain": plain, "regularised": regularised}
        for name, (said, plain, regularised) in results["shown"].items()
    ]
    return (
        f"Whisper tiny.en, priors from {settings['prior']} clean utterances, {settings['trials']} trials on "
        f"{settings['tuning']} utterances with {TUNED_ON} (the first is the pretrained model), tests on "
        f"{settings['test']} utterances; {record['seconds'] / 60:.0f} minutes of one core.\n\n"
        f"## Word error\n\n{table_of_rows(rows)}\n\n## The search\n\n{table_of_rows(trials)}\n\n"
        f"## The first utterance\n\n{table_of_rows(texts)}"
    )


def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "regularise_whisper", METHODS)
    arguments.set_defaults(seeds=[0])
    args = arguments.parse_args()
    size = QUICK if args.quick else FULL
    runs = {f"whisper-seed{seed}": {"method": "whisper", "seed": seed, **size} for seed in args.seeds[:1]}
    (record,) = run_all(one, runs, args.output, args.jobs).values()
    write_report(args, "Whisper regularised without training", report(record))


if __name__ == "__main__":
    main()
