"""One measurement from start to end: what the recipe asks, the original, every cell, the worst tensors."""

from dataclasses import dataclass

from compress import prompts
from compress.checkpoint.reader import Checkpoint
from compress.disk import cache
from compress.errors import InputError
from compress.model.hybrid import HybridModel
from compress.passes.quantize import Options, Quantize
from compress.prompts import PromptSet
from compress.recipe.check import Check
from compress.recipe.recipe import LoadedRecipe
from compress.recipe.source import Source
from compress.runtime.artifacts import CheckpointArtifact
from compress.studies import results
from compress.studies.sensitivity import cells, original, worst
from compress.studies.sensitivity.cells import Cell
from compress.studies.sensitivity.findings import CellFound, Measured, Study
from compress.studies.sensitivity.measure import Measure


@dataclass(frozen=True)
class Job:
    """What to measure, on what."""

    recipe: LoadedRecipe
    source: Source
    formats: tuple[str, ...]
    samples: int | None = None  # None: the recipe's
    length: int | None = None
    device: str = "cpu"
    seed: int = 0


def study(job: Job) -> Study:
    """Refuses what can be refused, measures, and returns what `--json` writes."""
    checkpoint = Checkpoint(job.source.folder)
    step, _ = Quantize(quantize_options(job.recipe)).fitted(checkpoint.model)
    step.requires(checkpoint.model)
    options = step.options
    check = check_settings(job)
    for name in check.prompts:
        prompts.refuse_unusable(name, job.source.folder, job.recipe.folder, length=check.length)
    weights_sha256 = checkpoint.weights_sha256()
    artifact = CheckpointArtifact(checkpoint, job.device, weights_sha256)
    sets = prompts.load_all(
        artifact, artifact.sha256(), check, purpose="check", seed=job.seed, folder=job.recipe.folder
    )
    tried = cells.of_formats(checkpoint.model, options, job.formats, job.device)
    stored = cells.of_recipe(checkpoint.model, options, job.device)
    return {
        "schema": 1,
        "model": results.describe(job.source, checkpoint.model, weights_sha256),
        "prompts": prompts.used(sets),
        **_measured(checkpoint.model, artifact.sha256(), sets, tried, stored, job.device),
    }


def quantize_options(recipe: LoadedRecipe) -> Options:
    """The options of the recipe's one quantize pass."""
    found = [step.options for step in recipe.recipe.passes if isinstance(step.options, Options)]
    if not found:
        raise InputError(f"{recipe.path}: has no quantize pass, whose cost could be measured")
    if len(found) > 1:
        raise InputError(f"{recipe.path}: has {len(found)} quantize passes; sensitivity measures those of one")
    return found[0]


def check_settings(job: Job) -> Check:
    """The recipe's check, or the default one, with the options' samples and length."""
    given = {"samples": job.samples, "length": job.length}
    return (job.recipe.recipe.check or Check()).model_copy(
        update={name: value for name, value in given.items() if value is not None}
    )


def _measured(model: HybridModel, model_sha256: str, sets: list[PromptSet], tried: list[Cell], stored: list[Cell],
              device: str) -> Measured:  # fmt: skip
    """The figures of all tried cells, and the worst tensors of those that the recipe stores."""
    cache.refuse_full_disk(original.bytes_needed(model, sets), "hidden states and the baseline's log-probabilities")
    with cache.scratch("sensitivity") as scratch:
        originals = [
            original.Original(model, prompt_set, model_sha256, scratch / str(number), device)
            for number, prompt_set in enumerate(sets)
        ]
        measure = Measure(model, originals, device)
        divergences = measure.all(tried, "sensitivity")
        return {
            "cells": [_row(model, cell, value) for cell, value in zip(tried, divergences, strict=True)],
            "worst_tensors": worst.find(stored, measure),
        }


def _row(model: HybridModel, cell: Cell, divergence: float) -> CellFound:
    layer = cell.layer
    return {
        "layer": layer,
        "unit": cell.unit.name,
        "kind": cell.unit.name if layer is None else model.layer(layer).kind,
        "role": str(cell.role),
        "format": cell.format,
        "stored": cell.stored,
        "parameters": cell.parameters,
        "bytes": cell.bytes,
        "kl_divergence_mean": divergence,
    }
