"""What a bottleneck costs: NVIB models timed beside the plain models they wrap, on the same inputs.

    python examples/benchmark.py            # every case, and how the cost grows; writes benchmark.json and .png
    python examples/benchmark.py --quick    # small shapes, under 2 minutes
    python examples/benchmark.py --device cuda --dtype bfloat16

Weights are random. In evaluation every log-variance is random in [-4, 0], so that no term of denoising attention is
skipped. The two models take turns, and a ratio is the median of the ratios of neighbouring runs.
"""

import argparse
import copy
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import pyplot
from transformers import BartConfig, BartForConditionalGeneration
from transformers.utils import logging

from nvib_hf import NvibForConditionalGeneration
from nvib_hf.versions import CACHE
from nvib_hf.wrapping.model_card import markdown_table

SHAPES = {
    "base": {"d_model": 768, "layers": 6, "heads": 12, "ffn": 3072, "vocab": 50265},
    "small": {"d_model": 256, "layers": 3, "heads": 8, "ffn": 1024, "vocab": 8000},
    "tiny": {"d_model": 64, "layers": 2, "heads": 4, "ffn": 128, "vocab": 1000},
}

ALL = {"attentions": ["cross", "encoder", "decoder"]}  # have NVIB


def plain_model(shape: str, positions: int = 4100) -> BartForConditionalGeneration:
    size = SHAPES[shape]
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=size["vocab"],
            d_model=size["d_model"],
            encoder_layers=size["layers"],
            decoder_layers=size["layers"],
            encoder_attention_heads=size["heads"],
            decoder_attention_heads=size["heads"],
            encoder_ffn_dim=size["ffn"],
            decoder_ffn_dim=size["ffn"],
            max_position_embeddings=positions,
            dropout=0.0,
            forced_eos_token_id=None,
        )
    )


def wrapped(plain: BartForConditionalGeneration, **settings) -> NvibForConditionalGeneration:
    """The same model with a bottleneck whose variances and pseudo-counts are nowhere trivial."""
    settings = {"lambda_gaussian": 0.01, "lambda_dirichlet": 0.01, **settings}
    model = NvibForConditionalGeneration.from_base_pretrained(copy.deepcopy(plain), **settings)
    with torch.no_grad():
        for layer in model.nvib_layers().values():
            layer.mu_logvar.bias[layer.size_out :].uniform_(-4, 0)
    return model


def drop_share(model: NvibForConditionalGeneration, inputs: dict, share: float) -> None:
    """Random pseudo-counts, and the threshold under which ``share`` of the vectors of these inputs fall."""
    nvib = model.nvib
    with torch.no_grad():
        nvib.alpha_weight.normal_()
        nvib.alpha_quadratic.zero_()
        log_alpha = model.encode(**inputs).log_alpha[:, 1:]
    nvib.alpha_threshold = log_alpha.quantile(share).exp().item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    first: Callable, second: Callable, repeats: int, seconds_at_least: float, device: torch.device
) -> dict[str, float]:
    """Median seconds of each, and the median ratio first / second of neighbouring runs, after a warm-up.

    The runs of short cases are repeated until they took ``seconds_at_least`` together: on a busy machine a few say
    little.
    """

    def seconds(run: Callable) -> float:
        gc.collect()  # what one model leaves behind is not the other's cost
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return time.perf_counter() - start

    seconds(first), seconds(second)
    pairs = []
    while len(pairs) < repeats or sum(map(sum, pairs)) < seconds_at_least:
        pairs.append((seconds(first), seconds(second)))
    return {
        "nvib_seconds": statistics.median(a for a, _ in pairs),
        "plain_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


class Bench:
    def __init__(self, device: str, dtype: str, repeats: int, seconds_at_least: float) -> None:
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.repeats, self.seconds_at_least = repeats, seconds_at_least
        self.measures_memory = self.device.type == "cuda" or (self.device.type == "cpu" and sys.platform == "linux")

    def models(self, shape: str, **settings) -> tuple[NvibForConditionalGeneration, BartForConditionalGeneration]:
        torch.manual_seed(0)
        plain = plain_model(shape).to(self.device, self.dtype)
        return wrapped(plain, **settings), plain

    def tokens(self, shape: str, batch: int, length: int) -> torch.Tensor:
        return torch.randint(4, SHAPES[shape]["vocab"], (batch, length), device=self.device)

    def compare(self, nvib: Callable, plain: Callable) -> dict[str, float]:
        return compare(nvib, plain, self.repeats, self.seconds_at_least, self.device)

    def training(self, shape: str, batch: int, source: int, target: int, **settings) -> dict[str, float]:
        models = self.models(shape, **settings)
        inputs = {"input_ids": self.tokens(shape, batch, source), "labels": self.tokens(shape, batch, target)}

        def step(model) -> None:
            model.zero_grad()
            model(**inputs).loss.backward()

        nvib, plain = (model.train() for model in models)
        return self.compare(lambda: step(nvib), lambda: step(plain))

    def peak_memory(self, shape: str, batch: int, source: int, target: int, kappa: int = 1) -> dict[str, float]:
        """Peak memory in MiB, the device's or the resident one, of fresh processes that take two training steps."""
        dtype = str(self.dtype).removeprefix("torch.")

        def peak(kind: str) -> float:
            case = [kind, shape, batch, source, target, kappa, str(self.device), dtype]
            command = [sys.executable, __file__, "--peak-memory", json.dumps(case)]
            command += ["--threads", str(torch.get_num_threads())]
            return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])

        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # which those processes could lack
        nvib, plain = peak("nvib"), peak("plain")
        return {"nvib_mib": nvib, "plain_mib": plain, "ratio": nvib / plain}

    @torch.no_grad()
    def evaluation(self, shape: str, batch: int, source: int, target: int, **settings) -> dict[str, float]:
        nvib, plain = (model.eval() for model in self.models(shape, **settings))
        inputs = {
            "input_ids": self.tokens(shape, batch, source),
            "decoder_input_ids": self.tokens(shape, batch, target),
        }
        return self.compare(lambda: nvib(**inputs), lambda: plain(**inputs))

    def generation(
        self, shape: str, batch: int, source: int, new: int, beams: int, dropped: float = 0.0, **settings
    ) -> dict[str, float]:
        nvib, plain = (model.eval() for model in self.models(shape, **settings))
        inputs = {"input_ids": self.tokens(shape, batch, source)}
        if dropped:
            drop_share(nvib, inputs, dropped)
        options = {"max_new_tokens": new, "min_new_tokens": new, "num_beams": beams, "do_sample": False}
        result = self.compare(lambda: nvib.generate(**inputs, **options), lambda: plain.generate(**inputs, **options))
        return result | self.cache_bytes(nvib, plain, inputs, beams)

    @torch.no_grad()
    def cache_bytes(self, nvib, plain, inputs: dict, beams: int) -> dict[str, float]:
        """Bytes kept for cross-attention while decoding: keys, values, and all that NVIB adds to them."""

        def keys_and_values(cache) -> int:
            layers = cache.cross_attention_cache.layers
            return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

        start = inputs["input_ids"][:, :1]
        packed = nvib._packed_encoder_outputs(nvib.encode(**inputs))
        kept = nvib(encoder_outputs=packed, decoder_input_ids=start, use_cache=True)[CACHE]
        states = plain.get_encoder()(**inputs)
        full = plain(encoder_outputs=states, decoder_input_ids=start, use_cache=True)[CACHE]
        nvib_bytes = keys_and_values(kept) + packed[0].nbytes
        # The plain model holds a copy for every beam; an NVIB model's beams share their source's.
        plain_bytes = beams * (keys_and_values(full) + states[0].nbytes)
        return {"nvib_cache": nvib_bytes, "plain_cache": plain_bytes, "cache_ratio": nvib_bytes / plain_bytes}

    def loading(self, shape: str) -> dict[str, float]:
        """Loading a saved NVIB model, and wrapping a saved plain one, against loading the plain one."""
        nvib, plain = self.models(shape)
        with tempfile.TemporaryDirectory() as folder:
            nvib.save_pretrained(f"{folder}/nvib")
            plain.save_pretrained(f"{folder}/plain")

            def afresh(load: Callable, name: str) -> Callable:
                # Loading compiles a pattern for each weight; those of two models in turn overflow Python's cache.
                return lambda: (re.purge(), load(f"{folder}/{name}"))

            load_plain = afresh(BartForConditionalGeneration.from_pretrained, "plain")
            loaded = self.compare(afresh(NvibForConditionalGeneration.from_pretrained, "nvib"), load_plain)
            wrapping = self.compare(afresh(NvibForConditionalGeneration.from_base_pretrained, "plain"), load_plain)
        extra = sum(p.nbytes for p in nvib.nvib.parameters()) / sum(p.nbytes for p in plain.parameters())
        return loaded | {"wrap_ratio": wrapping["ratio"], "nvib_weights": extra}


def print_peak_memory(
    kind: str, shape: str, batch: int, source: int, target: int, kappa: int, device: str, dtype: str
) -> None:
    torch.manual_seed(0)
    model = plain_model(shape).to(device, getattr(torch, dtype)).train()
    if kind == "nvib":
        model = NvibForConditionalGeneration.from_base_pretrained(model, kappa=kappa).train()
    lengths = {"input_ids": source, "labels": target}
    inputs = {name: torch.randint(4, SHAPES[shape]["vocab"], (batch, n), device=device) for name, n in lengths.items()}
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
    if torch.device(device).type == "cuda":
        print(torch.cuda.max_memory_allocated(device) / 2**20)
    else:
        # Not ru_maxrss: it starts from what the parent process held.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        print(int(status["VmHWM"].split()[0]) / 1024)


def cases(bench: Bench, quick: bool, only: str) -> dict[str, dict[str, float]]:
    """The table's rows whose names contain ``only``: goal for the ratio, figures."""
    shape = "small" if quick else "base"
    long, new = (256, 16) if quick else (1024, 64)
    middle, source, target = (128, 64, 32) if quick else (512, 128, 128)
    rows = {
        "training step": (1.05, lambda: bench.training(shape, 4, source, target)),
        "training step, small shape": (1.08, lambda: bench.training("small", 16, 64, 64)),
        "training step, kappa 4": (1.35, lambda: bench.training(shape, 4, source, target, kappa=4)),
        "greedy, source short": (1.05, lambda: bench.generation(shape, 8, source, new, 1)),
        "beam-4, source short": (1.10, lambda: bench.generation(shape, 8, source, new, 4)),
        "greedy, source middle": (1.03, lambda: bench.generation(shape, 8, middle, new, 1)),
        "beam-4, source middle": (1.25, lambda: bench.generation(shape, 8, middle, new, 4)),
        "teacher-forced evaluation": (1.03, lambda: bench.evaluation(shape, 8, middle, target)),
        "beam-4, source long, 60 % dropped": (0.28, lambda: bench.generation(shape, 8, long, new, 4, 0.6)),
        "greedy, source long, 60 % dropped": (0.80, lambda: bench.generation(shape, 8, long, new, 1, 0.6)),
        "greedy, small shape, source short": (1.05, lambda: bench.generation("small", 8, 64, new, 1)),
        "greedy, small shape, source middle": (1.03, lambda: bench.generation("small", 8, middle, new, 1)),
        "beam-4, small shape, source long": (0.42, lambda: bench.generation("small", 8, long, new, 4)),
        "teacher-forced, small shape": (1.03, lambda: bench.evaluation("small", 8, middle, 64)),
        "training step, all attentions": (1.25, lambda: bench.training(shape, 4, source, target, **ALL)),
        "teacher-forced, all attentions": (1.10, lambda: bench.evaluation(shape, 8, middle, target, **ALL)),
        "greedy, source short, all attentions": ("", lambda: bench.generation(shape, 8, source, new, 1, **ALL)),
        "loading": (1.10, lambda: bench.loading(shape)),
    }
    if bench.measures_memory:
        rows["peak memory of a training step"] = (1.05, lambda: bench.peak_memory(shape, 4, source, target))
    results = {}
    for name, (goal, run) in rows.items():
        if only in name:
            results[name] = {"goal": "" if quick else goal, **run()}  # the goals are those of the full shapes
            print(f"{name:36} {results[name]['ratio']:.3f}", flush=True)
    return results


def growth(bench: Bench, quick: bool) -> dict[str, list[dict[str, float]]]:
    """Cost of a training step and of teacher-forced evaluation against source length, and of a step against kappa."""
    shape, lengths = ("tiny", (64, 128, 256)) if quick else ("small", (64, 128, 256, 512, 1024, 2048, 4096))
    kappas = (1, 4) if quick else (1, 2, 4, 8)

    def training(batch: int, source: int, target: int, kappa: int) -> dict[str, float]:
        measured = bench.training(shape, batch, source, target, kappa=kappa)
        memory = bench.peak_memory(shape, batch, source, target, kappa) if bench.measures_memory and not quick else {}
        return memory | measured

    return {
        "training": [{"source": n, **training(2, n, 64, 1)} for n in lengths],
        "evaluation": [{"source": n, **bench.evaluation(shape, 2, n, 64)} for n in lengths],
        "kappa": [{"kappa": k, **training(4, 128, 128, k)} for k in kappas],
    }


def growth_table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = []
    for name, rows in results.items():
        for row in rows:
            case = f"training, kappa {row['kappa']}" if name == "kappa" else f"{name}, source {row['source']}"
            memory = [f"{row[key]:.0f}" if key in row else "" for key in ("plain_mib", "nvib_mib")]
            seconds = [f"{row[key]:.3g}" for key in ("plain_seconds", "nvib_seconds")]
            lines.append((case, *seconds, f"{row['ratio']:.2f}", *memory))
    return markdown_table(("", "plain (s)", "NVIB (s)", "ratio", "plain (MiB)", "NVIB (MiB)"), *lines)


def draw(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, (name, rows) in zip(axes, results.items(), strict=True):
        x = "kappa" if name == "kappa" else "source"
        for kind in ("plain", "nvib"):
            axis.plot([r[x] for r in rows], [r[f"{kind}_seconds"] for r in rows], marker="o", label=kind)
        axis.set(xlabel=x, ylabel="seconds", title=name if name != "kappa" else "training", xscale="log", yscale="log")
        axis.legend()
    figure.savefig(path, dpi=150)


def table(results: dict[str, dict[str, float]]) -> str:
    lines = []
    for name, row in results.items():
        plain, nvib = (row.get(f"{kind}_seconds", row.get(f"{kind}_mib")) for kind in ("plain", "nvib"))
        lines.append((name, f"{plain:.4g}", f"{nvib:.4g}", f"{row['ratio']:.2f}", row["goal"]))
        if "wrap_ratio" in row:
            lines.append(("loading and wrapping a plain model", "", "", f"{row['wrap_ratio']:.2f}", row["goal"]))
        if "60 %" in name:
            megabytes = [f"{row[f'{kind}_cache'] / 1e6:.4g}" for kind in ("plain", "nvib")]
            lines.append(("its cross-attention cache (MB)", *megabytes, f"{row['cache_ratio']:.2f}", 0.5))
    return markdown_table(("case", "plain (s, MiB)", "NVIB", "ratio", "goal"), *lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, under 2 minutes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=None, help="runs of each case, at least (3 if quick, else 5)")
    parser.add_argument("--only", default="", help="run the cases whose names contain this, or 'growth'")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    parser.add_argument("--peak-memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_memory:
        return print_peak_memory(*json.loads(arguments.peak_memory))

    repeats, seconds_at_least = (3, 0) if arguments.quick else (5, 10)
    bench = Bench(arguments.device, arguments.dtype, arguments.repeats or repeats, seconds_at_least)
    results = {"cases": cases(bench, arguments.quick, arguments.only)}
    if arguments.only in ("", "growth"):
        results["growth"] = growth(bench, arguments.quick)
        draw(results["growth"], arguments.output.with_suffix(".png"))
        print(growth_table(results["growth"]))
    results["settings"] = vars(arguments) | {"output": str(arguments.output), "torch": torch.__version__}
    arguments.output.write_text(json.dumps(results, indent=1))
    print(table(results["cases"]))


if __name__ == "__main__":
    main()
