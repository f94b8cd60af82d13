"""Every way of pruning experts, at every count, on a reference model: `python benchmarks/expert_pruning.py RESULTS.jsonl`

Each variant is a `prune_experts` block; its checkpoint is written by `apply`, from SAMPLES windows of the shipped prose
drawn with each of three seeds, and judged by KL and perplexity over every position of the shipped held-out prompts (or of
a text: `--text FILE`, which is how the defaults were chosen). Results are appended to the file as they come, and what is
in it is not run again. `--only` picks sections by the beginning of their name, `--count` numbers of experts; `--model`
takes another folder, a file of results for each; `--table` prints what the file holds.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from machine import describe_machine
from quality import chunks, load_text

from compress import prompts
from compress.apply import pipeline
from compress.check import baseline, metrics
from compress.checkpoint.reader import Checkpoint
from compress.model import sizes
from compress.prompts import PromptSet
from compress.recipe import resources, source
from compress.recipe.check import Check
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.artifacts import CheckpointArtifact
from compress.runtime.candidates import CheckpointCandidate

COUNTS, SEEDS, SAMPLES = (7, 6, 5, 4), (0, 1, 2), 24
DEFAULT = "default: reconstruction, rescale, least squares"
PLAIN = {"router": "slice", "recovery": "none"}
METHODS = {
    **{name: {"method": name} for name in ("frequency", "mean_gate", "ean", "reap", "reconstruction", "merge")},
    "merge by gate": {"method": "merge", "merge_weights": "mean_gate"},
}
OTHERS = {name: block for name, block in METHODS.items() if name != "reconstruction"}
SECTIONS = {
    "methods: plain slicing, no recovery": {
        name: block | PLAIN
        for name, block in METHODS.items()
    },
    "router: reconstruction, no recovery": {
        "rescale": {"router": "rescale", "recovery": "none"},
        "keep_rows": {"router": "keep_rows", "recovery": "none"},
    },
    "recovery: least squares": {
        DEFAULT: {},
        "slice, least squares": {"router": "slice"},
        "keep_rows, least squares": {"router": "keep_rows"},
    },
    "others: every method with every correction": {
        **{f"{name}, rescale": block | {"recovery": "none"} for name, block in OTHERS.items()},
        **{f"{name}, slice, least squares": block | {"router": "slice"} for name, block in OTHERS.items()},
        **{f"{name}, rescale, least squares": block for name, block in OTHERS.items()},
    },
    "damping: default with another": {f"damping {value:g}": {"damping": value} for value in (0.01, 0.1, 10.0)},
}  # fmt: skip
CORRECTED = {"": "reconstruction", ", rescale": "rescale", ", slice, least squares": "slice, least squares",
             ", rescale, least squares": DEFAULT}  # fmt: skip  # reconstruction, as each correction is named
COMPARED = (  # better, worse
    (DEFAULT, "reap"),
    (DEFAULT, "frequency"),
    *((name, f"{other}{how}") for other in ("reap", "frequency", "mean_gate") for how, name in CORRECTED.items()),
)
QUANTIZED = ("int8", "mixed", "int4-gptq")  # shipped recipes whose passes follow, for one seed; 8 is without pruning
BUDGETS = {7: 0.125, 6: 0.25, 5: 0.375, 4: 0.5}  # as many experts removed as by the uniform count


class Judge:
    """The original's log-probabilities on a text, and what a checkpoint differs from them window by window."""

    def __init__(self, text: str, folder: Path):
        original = CheckpointArtifact(Checkpoint(folder))
        if text == "heldout":
            settings = Check(prompts=("heldout",), samples=48, length=512)
            self._set = prompts.load_all(original, original.sha256(), settings, purpose="check", seed=0, folder=None)[0]
        else:
            self._set = PromptSet("text", chunks(source.load_tokenizer(folder), load_text(text))[:24])
        self._baseline = baseline.compute(original.candidate(), original.sha256(), self._set)

    def __call__(self, checkpoint: Path) -> dict[str, list[float]]:
        """Sums over the positions of each window, and how many there are."""
        windows = self._set.windows
        found = {"kl": [0.0] * len(windows), "nll": [0.0] * len(windows), "positions": [0] * len(windows)}
        model = Checkpoint(checkpoint, allow_quantized=True).model
        for window, start, logits in CheckpointCandidate(model).logits(windows, "prefill", lambda tokens: None):
            first = max(0, 1 - start)  # position 0 is not scored
            stop = start + len(logits)
            log_p = self._baseline.log_probs(window, start + first, stop)
            with torch.inference_mode():
                scores = metrics.score(log_p, logits[first:], windows[window][start + first + 1 : stop + 1])
            found["kl"][window] += float(scores.kl_divergence.sum())
            found["nll"][window] += float((scores.nll_candidate - scores.nll_baseline).sum())
            found["positions"][window] += len(scores.kl_divergence)
        return found | {"weight_bytes": sizes.stored_bytes(model.units)}


def run(passes: list[dict], seed: int, folder: Path, samples: int, model: Path) -> Path:
    """The checkpoint of one variant."""
    recipe = folder / "variant.yaml"
    calibration = {"prompts": ["prose"], "samples": samples, "length": 512}
    recipe.write_text(yaml.safe_dump({"version": 1, "calibration": calibration, "passes": passes}))
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(model)), folder / "out", seed=seed, overwrite=True)
    pipeline.apply(job)
    return folder / "out" / "checkpoint"


def jobs(only: list[str], counts: Sequence[int], inflates: bool):
    """(variant, count, seed, passes) of everything that is asked for; rows are kept only where others' gates grow."""
    for section, variants in SECTIONS.items():
        if _is_asked(section, only):
            for count, seed in itertools.product(counts, SEEDS):
                for name, block in variants.items():
                    if inflates or block.get("router") != "keep_rows":
                        yield name, count, seed, [{"prune_experts": {"keep": count, **block}}]
    if _is_asked("budget: shared among layers", only):
        for count, seed in itertools.product(counts, SEEDS):
            yield "budget", count, seed, [{"prune_experts": {"budget": BUDGETS[count]}}]
    if _is_asked("quantized: as shipped recipes do", only):
        for recipe, count in itertools.product(QUANTIZED, (8, *counts)):
            pruning = [{"prune_experts": {"keep": count}}] if count < 8 else []
            yield recipe, count, 0, pruning + yaml.safe_load(load_recipe(recipe).text)["passes"]


def _is_asked(section: str, only: list[str]) -> bool:
    return not only or section.startswith(tuple(only))


def read(path: Path) -> dict[tuple, dict]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {(r["variant"], r["count"], r["seed"]): r for r in map(json.loads, lines)}


def kl(result: dict) -> np.ndarray:
    """Sums of KL by window over all positions: their total is the mean over positions."""
    return np.array(result["kl"]) / sum(result["positions"])


def table(results: dict[tuple, dict]) -> str:
    """Mean over seeds with the lowest and highest seed, perplexity ratio, and what methods have less than others."""
    names = list(dict.fromkeys(name for name, _, _ in results if name not in QUANTIZED))
    counts = [count for count in COUNTS if any(c == count for _, c, _ in results)]
    lines = ["| variant | " + " | ".join(f"8 -> {c}: mean KL (seeds) / ppl ratio" for c in counts) + " |"]
    lines.append("|---" * (1 + len(counts)) + "|")
    for name in names:
        cells = [_cell([results[name, c, seed] for seed in SEEDS if (name, c, seed) in results]) for c in counts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_advantages(results, counts), "", *_quantized(results, counts)])


def _cell(seeds: list[dict]) -> str:
    if not seeds:
        return ""
    means = [kl(result).sum() for result in seeds]
    ratio = np.mean([np.exp(sum(r["nll"]) / sum(r["positions"])) for r in seeds])
    return f"{np.mean(means):.5f} ({min(means):.5f}-{max(means):.5f}) / {ratio:.4f}"


def _advantages(results: dict[tuple, dict], counts: list[int]) -> list[str]:
    """How much less KL one variant has than another: mean over seeds, 95 % bootstrap over windows."""
    lines = ["| less KL than | " + " | ".join(f"8 -> {c}" for c in counts) + " |"]
    lines.append("|---" * (1 + len(counts)) + "|")
    for better, worse in COMPARED:
        cells = [_difference(results, better, worse, count) for count in counts]
        if any(cells):
            lines.append(f"| {better}, than {worse} | {' | '.join(cells)} |")
    return lines


def _difference(results: dict[tuple, dict], better: str, worse: str, count: int) -> str:
    pairs = [(results.get((worse, count, s)), results.get((better, count, s))) for s in SEEDS]
    pairs = [(a, b) for a, b in pairs if a and b]
    if not pairs:
        return ""
    windows = np.mean([kl(a) - kl(b) for a, b in pairs], axis=0)
    picks = np.random.default_rng(0).integers(0, len(windows), (10_000, len(windows)))
    low, high = np.percentile(windows[picks].sum(1), [2.5, 97.5])
    return f"{windows.sum():.5f} ({low:.5f} to {high:.5f})"


def _quantized(results: dict[tuple, dict], counts: list[int]) -> list[str]:
    """Bytes of the checkpoint's weights and mean KL, pruned to so many experts and then quantized."""
    lines = ["| then as | " + " | ".join(f"{c} experts: bytes / mean KL" for c in (8, *counts)) + " |"]
    lines.append("|---" * (2 + len(counts)) + "|")
    for recipe in QUANTIZED:
        found = [results.get((recipe, count, 0)) for count in (8, *counts)]
        cells = [f"{r['weight_bytes']:,} / {kl(r).sum():.5f}" if r else "" for r in found]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return lines


def measure(arguments: argparse.Namespace) -> None:
    """Appends what is asked for and not yet in the file."""
    judge, known = Judge(arguments.text, arguments.model), read(arguments.results)
    inflates = any(layer.experts.router.inflates for layer in Checkpoint(arguments.model).model.layers if layer.experts)
    with tempfile.TemporaryDirectory() as temporary, open(arguments.results, "a") as file:
        for name, count, seed, passes in jobs(arguments.only, arguments.count or COUNTS, inflates):
            if (name, count, seed) in known:
                continue
            found = judge(run(passes, seed, Path(temporary), arguments.samples, arguments.model))
            file.write(json.dumps({"variant": name, "count": count, "seed": seed, **found}) + "\n")
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--text", default="heldout", help="A text file, or heldout.")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="Windows of calibration, at most.")
    parser.add_argument("--only", action="append", default=[], help="The beginning of a section's name.")
    parser.add_argument("--count", action="append", type=int, choices=COUNTS, help="Experts that stay.")
    parser.add_argument("-m", "--model", type=Path, default=resources.folder("models") / "tiny-jamba")
    parser.add_argument("--table", action="store_true", help="Run nothing.")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    print(table(read(arguments.results)))
    print(json.dumps(describe_machine()), file=sys.stderr)


if __name__ == "__main__":
    main()
