"""One survey from start to end: refusals, prompts, a walk over the layers, what the layers add up to."""

from collections.abc import Container
from dataclasses import dataclass

import torch

from compress import parallel, prompts
from compress.calibration.walk import walk
from compress.checkpoint.reader import Checkpoint
from compress.disk import cache
from compress.model import expert_counts
from compress.model.hybrid import HybridModel
from compress.recipe.calibration import Calibration
from compress.recipe.source import Source
from compress.runtime.artifacts import CheckpointArtifact
from compress.studies import results
from compress.studies.experts import one_layer
from compress.studies.experts.findings import Layer, Survey
from compress.terminal import progress

STATES = 4  # on disk: before a layer, between its blocks, after it, and what its experts give


@dataclass(frozen=True)
class Job:
    """Which model to survey, on which tokens."""

    source: Source
    settings: Calibration
    device: str = "cpu"
    seed: int = 0


def survey(job: Job) -> Survey:
    """Refuses what can be refused, surveys, and returns what `--json` writes."""
    checkpoint = Checkpoint(job.source.folder)
    moe = expert_counts.refuse_unprunable(checkpoint.model, str(checkpoint.folder))
    for name in job.settings.prompts:
        prompts.refuse_unusable(name, job.source.folder, length=job.settings.length, purpose="calibration")
    weights_sha256 = checkpoint.weights_sha256()
    artifact = CheckpointArtifact(checkpoint, job.device, weights_sha256)
    sets = prompts.load_all(artifact, artifact.sha256(), job.settings, purpose="calibration", seed=job.seed)
    windows = prompts.longest_first(sets)  # as `apply` does, so that the same tokens are withheld there
    layers = _surveyed(checkpoint.model, moe, windows, job.device)
    return {
        "schema": 1,
        "model": results.describe(job.source, checkpoint.model, weights_sha256),
        "prompts": prompts.used(sets),
        "tokens": sum(map(len, windows)),
        "layers": layers,
        "total": one_layer.total(layers),
    }


@parallel.steady()
@torch.inference_mode()
def _surveyed(model: HybridModel, moe: Container[int], windows: list[torch.Tensor], device: str) -> list[Layer]:
    """What is found in every MoE layer, in order."""
    cache.refuse_full_disk(STATES * 4 * sum(map(len, windows)) * model.config.hidden_size, "hidden states")
    with (
        cache.scratch("experts") as folder,
        progress.task("experts", model.config.num_hidden_layers) as advance,
    ):
        return [
            one_layer.survey_layer(unit, inputs)
            for unit, inputs in walk(model, windows, folder / "states", device, advance)
            if inputs.index in moe
        ]
