"""Output error of every block and every expert on the same inputs, against what rounding to nearest would give.

What a weight audit cannot judge: a matrix whose errors compensate each other (GPTQ) may be far from the original, and one in too
coarse a format near to it. Each block reads the hidden states that the original has there, so an error stays where it arises:

    relative error = mean over tokens of  m^2 |y' - y|^2 / |h|^2

with y the block's output, m what it counts in the layer and h what the layer leaves, as pruning measures it. An expert is judged by
those tokens that its router gives it first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NotRequired, TypedDict

import numpy as np
import torch

from compress import prompts
from compress.check.audit import Models, nearest
from compress.model.block import Layer, Residual
from compress.model.records import Kept
from compress.model.replay import Ought
from compress.model.weight import Unit, Weight
from compress.prompts.seeds import derive_seed
from compress.recipe.source import has_tokenizer, load_tokenizer
from compress.runtime.artifacts import Artifact
from compress.runtime.eager import Eager
from compress.runtime.inference import LayerWeights, embed, empty_state
from compress.terminal.progress import Advance

WINDOWS, LENGTH = 4, 128  # tokens of `prose` that layers are run on
EXPERT_TOKENS = 64  # of them, those that each expert is run on
FACTOR = 1.3  # of what rounding to nearest gives; docs/checks.md has where it comes from
EXPERT_FACTOR = 2.0  # the same of an expert, on fewer tokens
FLOAT_NOISE = 1e-9  # a relative error that float32 sums in another order explain


class LayerAuditFacts(TypedDict):
    """`relative_error` is the mean over tokens of m^2 |y' - y|^2 / |h|^2; `expert` is None for a whole block, else the number that
    it has in the candidate."""

    artifact: str
    layer: int
    block: str
    expert: int | None
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
    """A row for each residual block, and one for each expert. `advance` hears of layers."""
    hidden = embed(models.original, ids, device)
    for index in range(models.original.config.num_hidden_layers):
        three = _Three.of(models, index, device)
        for place, residual in enumerate(three.original.layer.residuals):
            for expert, found, expected, counted in three.errors(place, hidden):
                yield _row(artifact, index, residual.block.kind, expert, counted, found, expected)
            hidden = three.original.leave(place, hidden)
        advance(1)


def _row(
    artifact: str, layer: int, block: str, expert: int | None, count: int, error: float, most: float | None
) -> LayerAuditFacts:
    row: LayerAuditFacts = {
        "artifact": artifact,
        "layer": layer,
        "block": block,
        "expert": expert,
        "tokens": count,
        "relative_error": error if np.isfinite(error) else None,
        "expected_at_most": most,
        "passed": bool(np.isfinite(error)) and (most is None or error <= most),
    }
    if not np.isfinite(error):
        row["note"] = "gives values that are not finite"
    elif most is None:
        row["note"] = "was computed anew by a pass"
    return row


@dataclass(frozen=True)
class _Bound:
    """A layer with its weights."""

    layer: Layer
    ops: Eager

    @staticmethod
    def of(layer: Layer, unit: Unit, device: str) -> "_Bound":
        return _Bound(layer, Eager(LayerWeights(unit, layer.prefix, device)))

    def given(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        """What a residual block adds to the hidden states [B, S, H]."""
        residual = self.layer.residuals[place]
        state = self.layer.restored(self.ops, empty_state(self.layer, len(hidden), hidden.device))
        return residual.multiplier * residual.block.run(self.ops, residual.normed(self.ops, hidden), state)[0]

    def leave(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.given(place, hidden)


@dataclass(frozen=True)
class _Three:
    """One layer as it was, as it is, and as rounding to nearest would have made it. `sources` are the numbers that the
    candidate's experts had."""

    original: _Bound
    candidate: _Bound
    nearest: _Bound
    anew: frozenset[str]  # names within the layer of what a pass computed anew
    sources: tuple[int, ...]

    @staticmethod
    def of(models: Models, index: int, device: str) -> "_Three":
        before, after = models.original.layer(index), models.candidate.layer(index)
        unit, ought = models.candidate.unit(f"layer.{index}"), models.ought
        rounded = unit.map(lambda weight: _nearest(weight, ought.get(weight.name)))
        anew = (name for name in unit.weights if not _follows(ought.get(name)))
        return _Three(
            _Bound.of(before, models.original.unit(unit.name), device),
            _Bound.of(after, unit, device),
            _Bound.of(after, rounded, device),
            frozenset(name.removeprefix(after.prefix) for name in anew),
            _sources(models, before),
        )

    def errors(self, place: int, hidden: torch.Tensor) -> Iterator[tuple[int | None, float, float | None, int]]:
        """Of a residual block and of its experts: the expert, its error, what it may be at most, and of how many tokens."""
        original, scale = self.original.given(place, hidden), None
        scale = (hidden + original).square().sum(-1)
        found, expected = (
            _relative(bound.given(place, hidden), original, scale) for bound in (self.candidate, self.nearest)
        )
        residual = self.candidate.layer.residuals[place]
        names = {residual.norm, *(spec.name for spec in residual.block.specs())}
        yield None, found, None if names & self.anew else FACTOR * expected + FLOAT_NOISE, scale.numel()
        if residual.block.experts is not None:
            yield from self._of_experts(place, residual, hidden.flatten(0, 1), scale.flatten())

    def _of_experts(
        self, place: int, residual: Residual, rows: torch.Tensor, scale: torch.Tensor
    ) -> Iterator[tuple[int | None, float, float | None, int]]:
        before = self.original.layer.residuals[place]
        experts = before.block.experts
        assert experts is not None  # which the candidate has
        x = before.normed(self.original.ops, rows)
        logits = self.original.ops.router_logits(x, experts.router)
        for expert, source in enumerate(self.sources):
            chosen = logits[:, source].topk(min(EXPERT_TOKENS, len(rows))).indices
            y = self._expert(self.original, place, source, rows[chosen])
            found, expected = (
                residual.multiplier**2 * _relative(self._expert(bound, place, expert, rows[chosen]), y, scale[chosen])
                for bound in (self.candidate, self.nearest)
            )
            stem = residual.block.experts.prefix(expert) if residual.block.experts else ""
            most = None if any(name.startswith(stem) for name in self.anew) else EXPERT_FACTOR * expected + FLOAT_NOISE
            yield expert, found, most, len(chosen)

    @staticmethod
    def _expert(bound: _Bound, place: int, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        residual = bound.layer.residuals[place]
        experts = residual.block.experts
        assert experts is not None
        return experts.run_one(bound.ops, expert, experts.inputs(bound.ops, residual.normed(bound.ops, hidden)))


def _relative(y: torch.Tensor, original: torch.Tensor, scale: torch.Tensor) -> float:
    """Mean over tokens of |y - original|^2 / scale."""
    return float(((y - original).double().square().sum(-1) / scale.double().clamp_min(1e-30)).mean())


def _follows(ought: Ought | None) -> bool:
    return ought is not None and ought.weight is not None and ought.follows


def _nearest(stored: Weight, ought: Ought | None) -> Weight:
    """As rounding to nearest would have left it; what was computed anew is as it is."""
    if ought is None or ought.weight is None or not ought.follows or ought.weight.shape != stored.shape:
        return stored
    return replace(nearest(stored, ought.weight), activation=stored.activation)


def _sources(models: Models, before: Layer) -> tuple[int, ...]:
    """The numbers in the original of the experts that a layer of the candidate has."""
    if before.experts is None:
        return ()
    numbers = tuple(range(before.experts.count))
    stem = before.prefix + before.experts.prefix(0).removesuffix("0.")
    for record in models.done:
        for change in record.changes or ():
            if isinstance(change, Kept) and change.stem == stem:
                numbers = tuple(numbers[source] for source in change.sources)
    return numbers
