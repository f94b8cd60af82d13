"""Output error of every block and every expert on the same inputs, against what rounding to nearest would give.

What a weight audit cannot judge: a matrix whose errors compensate each other (GPTQ) may be far from the original, and one in too
coarse a format near to it. Each block reads the hidden states that the original has there, so an error stays where it arises:

    relative error = mean over tokens of  m^2 |y' - y|^2 / |h|^2

with y the block's output, m what it counts in the layer and h what the layer leaves, as pruning measures it. An expert is judged by
those tokens that its router gives it first. A matrix whose errors compensate each other is judged alone, too, on what reaches it in
the original: |(W' - W) x|^2 / |W x|^2.
"""

import math
from collections.abc import Iterator
from typing import NotRequired, TypedDict

import numpy as np
import torch

from compress import prompts
from compress.check.audit import Models
from compress.check.layer_errors import Error, Three
from compress.prompts.seeds import derive_seed
from compress.recipe.source import has_tokenizer, load_tokenizer
from compress.runtime.artifacts import Artifact
from compress.runtime.inference import embed
from compress.strict.json_text import finite
from compress.terminal.progress import Advance

WINDOWS, LENGTH = 4, 128  # tokens of `prose` that layers are run on


class LayerAuditFacts(TypedDict):
    """`expert` is None for a whole block, else the number that it has in the candidate; `matrix` is None for a block or an expert.
    `relative_error` is the mean over tokens of m^2 |y' - y|^2 / |h|^2, of a matrix |(W' - W) x|^2 / |W x|^2."""

    artifact: str
    layer: int
    block: str
    expert: int | None
    matrix: str | None
    tokens: int
    relative_error: float | None
    expected_at_most: float | None
    passed: bool
    note: NotRequired[str]


def stage(artifact: str) -> str:
    """What the progress of it is shown under."""
    return f"{artifact}: audit of layers"


def tokens(original: Artifact, seed: int) -> torch.Tensor:
    """Ids [WINDOWS, LENGTH] or fewer: of `prose`, or drawn evenly from the vocabulary where there is no tokenizer."""
    seed = derive_seed(seed, "audit", "prose")
    if not has_tokenizer(original.folder):
        drawn = np.random.default_rng(seed).integers(original.config.vocab_size, size=(WINDOWS, LENGTH))
        return torch.from_numpy(drawn)
    prose = prompts.load(
        "prose", purpose="audit", tokenizer=load_tokenizer(original.folder), model=original, model_sha256="",
        samples=WINDOWS, length=LENGTH, seed=seed,
    )  # fmt: skip
    return torch.stack([window for window in prose.windows if len(window) == len(prose.windows[0])])


@torch.inference_mode()
def audit(artifact: str, models: Models, ids: torch.Tensor, device: str, advance: Advance) -> Iterator[LayerAuditFacts]:
    """A row for each residual block, each expert, and each matrix whose errors compensate each other. `advance` hears of
    layers."""
    hidden = embed(models.original, ids, device)
    for index in range(models.original.config.num_hidden_layers):
        three = Three.of(models, index, device)
        for place, residual in enumerate(three.original.layer.residuals):
            given = three.original.given(place, hidden)
            for error in three.errors(place, hidden, given):
                yield _row(artifact, index, residual.block.kind, error)
            hidden = hidden + given
        advance(1)


def _row(artifact: str, layer: int, block: str, error: Error) -> LayerAuditFacts:
    row: LayerAuditFacts = {
        "artifact": artifact,
        "layer": layer,
        "block": block,
        "expert": error.expert,
        "matrix": error.matrix,
        "tokens": error.tokens,
        "relative_error": finite(error.found),
        "expected_at_most": error.most,
        "passed": math.isfinite(error.found) and (error.most is None or error.found <= error.most),
    }
    if not math.isfinite(error.found):
        row["note"] = "gives values that are not finite"
    elif error.most is None:
        row["note"] = "was computed anew by a pass"
    return row
