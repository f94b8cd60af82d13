"""Does the predicted loss of a set of experts agree with what removing it costs? `python benchmarks/expert_survey.py`

For every number of experts kept: PAIRS pairs of a layer and a set of experts, drawn evenly from all there are. Predicted is
what `compress experts` goes by, from the shipped prose (and, beside it, the squared error that is not taken relative to
the hidden state); measured is the mean KL divergence on the shipped held-out prompts
of the model with only that layer pruned, by plain slicing. Prints Spearman's rank correlation with a bootstrap interval.
"""

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from scipy.stats import spearmanr

from compress import prompts
from compress.calibration.walk import walk
from compress.check.metrics import score
from compress.checkpoint.reader import Checkpoint
from compress.disk import cache
from compress.model import expert_counts
from compress.model.hybrid import HybridModel
from compress.model.weight import Unit
from compress.passes.pruning import removal
from compress.passes.pruning.reconstruction import Kept, Reconstruction
from compress.passes.pruning.statistics import collect
from compress.recipe import resources
from compress.recipe.calibration import Calibration
from compress.recipe.check import Check
from compress.runtime.artifacts import CheckpointArtifact
from compress.runtime.inference import Head, layer_weights, run_layer
from compress.studies.sensitivity.original import Original, logits

MODEL = resources.folder("models") / "tiny-jamba"
PAIRS = 60


def sampled_pairs(layers: list[int], experts: int, count: int, seed: int) -> list[tuple[int, Kept]]:
    everything = [(layer, kept) for layer in layers for kept in itertools.combinations(range(experts), count)]
    chosen = np.random.default_rng(seed).permutation(len(everything))[:PAIRS]
    return [everything[i] for i in sorted(chosen)]


def survey(model: HybridModel, windows: list[torch.Tensor], folder: Path, seed: int) -> dict[int, list[tuple]]:
    """By count: (layer, unit with those experts, count, predicted loss, plain squared error) of every pair."""
    layers = list(expert_counts.of_model(model))
    experts, least = model.config.total_experts, model.config.num_experts_per_tok
    pairs = {count: sampled_pairs(layers, experts, count, seed) for count in range(experts - 1, max(2, least) + 1, -1)}
    found: dict[int, list[tuple]] = {count: [] for count in pairs}
    for unit, inputs in walk(model, windows, folder, "cpu"):
        if inputs.index not in layers:
            continue
        statistics = collect(unit, inputs)
        plain = replace(statistics, importance=torch.ones_like(statistics.importance))
        reconstruction, squared = Reconstruction(statistics, "slice"), Reconstruction(plain, "slice")
        for count, drawn in pairs.items():
            for kept in [kept for layer, kept in drawn if layer == inputs.index]:
                pruned = removal.keep(unit, inputs, kept, keep_rows=False)
                found[count].append((inputs.index, pruned, count, reconstruction.loss(kept), squared.loss(kept)))
    return found


def with_layer(model: HybridModel, index: int, unit: Unit, count: int) -> HybridModel:
    """The model with one layer pruned."""
    counts = expert_counts.of_model(model) | {index: count}
    values = expert_counts.pruned(
        model.config_json, model.architecture.EXPERTS_KEYS, counts, model.config.num_hidden_layers, None
    )
    units = tuple(unit if unit.name == other.name else other for other in model.units)
    return replace(model, architecture=type(model.architecture).parse(values, "config.json"), units=units)


@torch.inference_mode()
def divergence(model: HybridModel, index: int, original: Original) -> float:
    """Mean KL of a model that is the original up to a layer."""
    states = original.entering[index]
    for layer in range(index, model.config.num_hidden_layers):
        run_layer(model, layer, layer_weights(model, layer, "cpu"), states, original.work, "cpu", lambda tokens: None)
        states = original.work
    found = []
    for window, start, rows in logits(states, Head(model, "cpu"), "cpu"):
        first, stop = max(0, 1 - start), start + len(rows)  # position 0 is not scored
        targets = original.prompt_set.windows[window][start + first + 1 : stop + 1]
        found.append(score(original.log_probs(window, start + first, stop), rows[first:], targets).kl_divergence)
    return float(np.concatenate(found).mean())


def interval(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """95 % of the rank correlation, bootstrap over pairs."""
    generator = np.random.default_rng(0)
    drawn = [generator.integers(0, len(predicted), len(predicted)) for _ in range(2000)]
    values = [spearmanr(predicted[i], measured[i]).statistic for i in drawn]
    return tuple(np.percentile(values, [2.5, 97.5]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64, help="Windows of prose, at most.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    artifact = CheckpointArtifact(Checkpoint(MODEL))
    digest, model = artifact.sha256(), Checkpoint(MODEL).model
    prose = prompts.load_all(
        artifact,
        digest,
        Calibration(samples=arguments.samples),
        purpose="calibration",
        seed=arguments.seed,
        folder=None,
    )
    heldout = prompts.load_all(artifact, digest, Check(prompts=("heldout",)), purpose="check", seed=0, folder=None)
    columns = ("kept of 8", "pairs", "Spearman", "95 %", "of the plain squared error", "measured KL, lowest to highest",
               "KL / predicted, median (5 to 95 %)")  # fmt: skip
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    with cache.scratch("survey") as scratch:
        found = survey(model, prose[0].windows, scratch / "walk", arguments.seed)
        original = Original(model, heldout[0], digest, scratch / "original", "cpu")
        for count, entries in found.items():
            predicted, squared = np.array([entry[3:] for entry in entries]).T
            measured = np.array([divergence(with_layer(model, i, u, n), i, original) for i, u, n, *_ in entries])
            low, high = interval(predicted, measured)
            ratio = np.percentile(measured / predicted, [50, 5, 95])
            print(
                f"| {count} | {len(entries)} | {spearmanr(predicted, measured).statistic:.3f} | {low:.3f} to {high:.3f} | "
                f"{spearmanr(squared, measured).statistic:.3f} | "
                f"{measured.min():.2g} to {measured.max():.2g} | {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}) |",
                flush=True,
            )
    print(json.dumps(describe_machine()), file=sys.stderr)


if __name__ == "__main__":
    main()
