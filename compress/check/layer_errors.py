"""What a layer, its experts and its matrices give from the same inputs: as it was, as it is, and rounded to nearest.

Every error is bounded by a factor of what rounding to nearest in the same formats gives, which is 1 for that and less for GPTQ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from compress.check.audit import Models, nearest
from compress.model.block import Layer, Residual
from compress.model.records import Kept
from compress.model.replay import Ought
from compress.model.weight import Unit, Weight
from compress.runtime.eager import Eager
from compress.runtime.inference import LayerWeights, empty_state

EXPERT_TOKENS = 64  # that each expert is run on
# Of what rounding to nearest gives; docs/checks.md has where they come from.
BLOCK, EXPERT, MATRIX, MATRIX_OF_EXPERT = 1.3, 2.0, 2.5, 3.5
FLOAT_NOISE = 1e-9  # a relative error that float32 sums in another order explain


class Error(NamedTuple):
    """Of a block, an expert of it or a matrix of either, over so many tokens; `most` is None where a pass computed it anew."""

    expert: int | None
    matrix: str | None
    tokens: int
    found: float
    most: float | None


Inputs = dict[str, torch.Tensor]  # of matrices, by name within the layer, [n, K]


@dataclass(frozen=True)
class Bound:
    """A layer with its weights."""

    layer: Layer
    unit: Unit
    ops: Eager

    @staticmethod
    def of(layer: Layer, unit: Unit, device: str, heard: Inputs | None = None) -> "Bound":
        """What reaches its matrices is put into `heard`, where that is given."""

        def tap(name: str, x: torch.Tensor) -> None:
            assert heard is not None
            heard[name] = x.flatten(0, -2)

        return Bound(layer, unit, Eager(LayerWeights(unit, layer.prefix, device, tap=None if heard is None else tap)))

    def given(self, place: int, hidden: torch.Tensor) -> torch.Tensor:
        """What a residual block adds to the hidden states [B, S, H]."""
        residual = self.layer.residuals[place]
        state = self.layer.restored(self.ops, empty_state(self.layer, len(hidden), hidden.device))
        return residual.multiplier * residual.block.run(self.ops, residual.normed(self.ops, hidden), state)[0]

    def given_by(self, place: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """What an expert makes of hidden states [n, H], times what the block counts."""
        residual = self.layer.residuals[place]
        experts = residual.block.experts
        assert experts is not None
        inputs = experts.inputs(self.ops, residual.normed(self.ops, rows))
        return residual.multiplier * experts.run_one(self.ops, expert, inputs)


@dataclass(frozen=True)
class Three:
    """One layer as it was, as it is, and as rounding to nearest would have made it. `sources` are the numbers that the
    candidate's experts had."""

    original: Bound
    candidate: Bound
    nearest: Bound
    inputs: Inputs  # of the matrices of `nearest`, from when it last ran
    ought: dict[str, Ought]  # by name within the layer
    sources: tuple[int, ...]

    @staticmethod
    def of(models: Models, index: int, device: str) -> "Three":
        before, after = models.original.layer(index), models.candidate.layer(index)
        unit = models.candidate.unit(f"layer.{index}")
        rounded = unit.map(lambda weight: _nearest(weight, models.ought.get(weight.name)))
        known, inputs = {name: models.ought[name] for name in unit.weights if name in models.ought}, Inputs()
        return Three(
            Bound.of(before, models.original.unit(unit.name), device),
            Bound.of(after, unit, device),
            Bound.of(after, rounded, device, inputs),
            inputs,
            {name.removeprefix(after.prefix): ought for name, ought in known.items()},
            _sources(models, before),
        )

    def errors(self, place: int, hidden: torch.Tensor, y: torch.Tensor) -> Iterator[Error]:
        """Of a residual block, which the original gives y [B, S, H] from hidden [B, S, H], then of its matrices, then of its
        experts and theirs."""
        residual, scale = self.candidate.layer.residuals[place], (hidden + y).square().sum(-1)
        self.inputs.clear()
        found, expected = (_relative(bound.given(place, hidden) - y, scale) for bound in (self.candidate, self.nearest))
        names = {residual.norm, *(spec.name for spec in residual.block.specs())}
        yield Error(None, None, scale.numel(), found, self._most(names, BLOCK * expected))
        experts = residual.block.experts
        prefixes = tuple(experts.prefix(e) for e in range(experts.count)) if experts else ()
        yield from self._of_matrices(None, {n: x for n, x in self.inputs.items() if not n.startswith(prefixes)})
        if prefixes:
            rows = hidden.flatten(0, 1)
            first = self._first(self.original.layer.residuals[place], rows)
            for expert, prefix in enumerate(prefixes):
                names, chosen = {name for name in self.ought if name.startswith(prefix)}, first[self.sources[expert]]
                yield from self._of_expert(place, expert, names, rows[chosen], scale.flatten()[chosen])

    def _of_expert(
        self, place: int, expert: int, names: set[str], rows: torch.Tensor, scale: torch.Tensor
    ) -> Iterator[Error]:
        y = self.original.given_by(place, self.sources[expert], rows)
        self.inputs.clear()
        found, expected = (
            _relative(bound.given_by(place, expert, rows) - y, scale) for bound in (self.candidate, self.nearest)
        )
        yield Error(expert, None, len(rows), found, self._most(names, EXPERT * expected))
        yield from self._of_matrices(expert, {name: x for name, x in self.inputs.items() if name in names})

    def _first(self, residual: Residual, rows: torch.Tensor) -> torch.Tensor:
        """Which tokens the router gives each row of its matrix first, [R, n]."""
        assert residual.block.experts is not None
        seen, router = residual.normed(self.original.ops, rows), residual.block.experts.router
        return self.original.ops.router_logits(seen, router).T.topk(min(EXPERT_TOKENS, len(rows))).indices

    def _of_matrices(self, expert: int | None, inputs: Inputs) -> Iterator[Error]:
        """Of those whose errors compensate each other; of others the weight audit tells all."""
        for name, x in inputs.items():
            ought = self.ought.get(name)
            if ought is None or ought.weight is None or not ought.follows or ought.method != "gptq":
                continue
            full = self.candidate.layer.prefix + name
            exact = ought.weight.dense().to(x.device)
            scale = (x @ exact.T).square().sum(-1)
            found, expected = (
                _relative(x @ (bound.unit.weights[full].dense().to(x.device) - exact).T, scale)
                for bound in (self.candidate, self.nearest)
            )
            factor = MATRIX if expert is None else MATRIX_OF_EXPERT
            yield Error(expert, name, len(x), found, factor * expected + FLOAT_NOISE)

    def _most(self, names: set[str], expected: float) -> float | None:
        """None where some of those were computed anew."""
        return None if any(not _follows(self.ought.get(name)) for name in names) else expected + FLOAT_NOISE


def _relative(lost: torch.Tensor, scale: torch.Tensor) -> float:
    """Mean over tokens of |lost|^2 / scale."""
    return float((lost.double().square().sum(-1) / scale.double().clamp_min(1e-30)).mean())


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
