"""Corrections of a pruned layer in closed form, folded into its experts' down_proj: any runtime then runs them.

`rescale` takes one factor per layer: without the removed experts' logits the softmax gives the others more than they had.
`least_squares` goes through the experts one by one. With z [n, F] what an expert's down_proj multiplies, times the gate,
and r [n, H] what the layer still lacks on the tokens routed to it, the correction D [H, F] of down_proj is the ridge
solution of  min |r - z D'|^2 + lambda |D|^2,  each token weighted by 1 / |h|^2. It stays only where it lowers the layer's
loss on the tokens that were withheld from the fit. So does the factor.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from compress import parallel
from compress.arithmetic.mixture import mixture
from compress.calibration.inputs import LayerInputs
from compress.checkpoint.writer import ShardWriter
from compress.model.weight import PLAIN_DTYPES, Unit, Weight, is_finite
from compress.passes.pruning.reconstruction import factor
from compress.passes.pruning.removal import expert_stem, rows_of
from compress.passes.pruning.statistics import TARGET, Statistics, given_states
from compress.runtime.eager import Eager
from compress.runtime.inference import HiddenStates

DOWN = "down_proj.weight"


@dataclass
class Correction:
    """A pruned unit on its way: `gates` [T, k] are those of its experts, `stash` writes new weights."""

    unit: Unit
    inputs: LayerInputs
    statistics: Statistics
    gates: torch.Tensor
    stash: ShardWriter

    def __post_init__(self) -> None:
        names = (TARGET, "given", "candidate")
        self._target, self._given, self._candidate = (given_states(self.unit, self.inputs, name) for name in names)
        self._replay(self.unit, self._given)
        self.loss = self._loss(self._given)  # over the withheld tokens, of `unit` as it stands

    def rescale(self) -> float:
        """One factor for all experts, by least squares over the tokens that are not withheld; 1 where it does not help."""
        both = own = 0.0
        for span, target, given in self._blocks(self._given):
            weight = self._fit_weights(span)
            both += float(((target * given).sum(1) * weight).sum())
            own += float((given.square().sum(1) * weight).sum())
        scale, scaled = factor(both, own), self.unit
        for expert in range(self.gates.shape[1]):
            scaled = scaled.replaced(_scaled(self.unit.weights[self._down(expert)], scale))
        self._replay(scaled, self._candidate)
        return scale if self._adopt(lambda: scaled) else 1.0

    def recover(self, damping: float) -> list[int]:
        """Least squares, expert by expert; returns those whose correction was kept."""
        return [expert for expert in range(self.gates.shape[1]) if self._recover(expert, damping)]

    def stored_loss(self) -> float:
        """Of the unit as it was written, by running all of it once more."""
        self._replay(self.unit, self._given)
        return self._loss(self._given)

    def _replay(self, unit: Unit, states: HiddenStates) -> None:
        """Runs a unit: what its experts give, on disk."""
        experts, ops = self.inputs.experts, self.inputs.operators(unit)
        for number, span, x in self._rows():
            seen = experts.inputs(ops, x)
            given = mixture(seen, self.gates[span], lambda expert, rows: experts.run_one(ops, expert, rows))
            states.write(number, given.view(states.shapes[number]))

    def _adopt(self, unit: Callable[[], Unit]) -> bool:
        """Takes the unit, which gives what the candidate states hold, if the loss is less; says whether."""
        loss = self._loss(self._candidate)
        if not loss < self.loss:  # nor if it is NaN
            return False
        self._given, self._candidate, self.loss = self._candidate, self._given, loss
        self.unit = unit()
        return True

    def _recover(self, expert: int, damping: float) -> bool:
        """The correction is judged as it will be stored, in the weight's type."""
        ops, weight = self.inputs.operators(self.unit), self.unit.weights[self._down(expert)]
        change = self._solve(expert, ops, damping)
        if change is None:
            return False
        dense = weight.dense()
        corrected = (dense + change.cpu()).to(PLAIN_DTYPES[weight.format])
        if not is_finite(corrected):
            return False
        change = (corrected.float() - dense).to(change.device)
        for number, span, x in self._rows():
            routed, z = self._multiplied(expert, ops, span, x)
            given = self._given.read(number).to(x.device).flatten(0, 1)
            given[routed] += parallel.linear(z, change)
            self._candidate.write(number, given.view(self._given.shapes[number]))
        return self._adopt(lambda: self._written(weight, corrected))

    def _solve(self, expert: int, ops: Eager, damping: float) -> torch.Tensor | None:
        """The correction [H, F] of an expert's down_proj; None where no token that is not withheld is routed to it."""
        hidden, width = self.unit.weights[self._down(expert)].shape
        moments = torch.zeros(width, width, device=self.inputs.device)
        cross = torch.zeros(width, hidden, device=self.inputs.device)
        for number, span, x in self._rows():
            routed, z = self._multiplied(expert, ops, span, x)
            lacking = (self._target.read(number) - self._given.read(number)).to(x.device).flatten(0, 1)[routed]
            weight = self._fit_weights(span)[routed].sqrt()[:, None]
            z = z * weight
            parallel.add_moments(moments, z)
            parallel.add_product(cross, z, lacking * weight)
        return _ridge(parallel.mirror(moments), cross, damping)

    def _written(self, weight: Weight, corrected: torch.Tensor) -> Unit:
        new = weight.with_load(weight.format, rows_of(corrected))
        self.stash.write(new)
        return self.unit.replaced(self.stash.written(new))

    def _multiplied(self, expert: int, ops: Eager, span: slice, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of the rows are routed to the expert, and what its down_proj multiplies there times their gates."""
        gates = self.gates[span, expert]
        routed = gates.nonzero()[:, 0]
        experts = self.inputs.experts
        z = experts.hidden(ops, expert, experts.inputs(ops, x[routed]))
        return routed, z * gates[routed, None]

    def _fit_weights(self, span: slice) -> torch.Tensor:
        """Of the tokens of a block: their importance, zero where they are withheld."""
        return self.statistics.importance[span] * ~self.statistics.withheld[span]

    def _loss(self, given: HiddenStates) -> float:
        total = 0.0
        for span, target, values in self._blocks(given):
            weight = self.statistics.importance[span] * self.statistics.withheld[span]
            total += float(((target - values).square().sum(1) * weight).sum())
        return total / int(self.statistics.withheld.sum())

    def _rows(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Block by block: its number, its place among all tokens, and what the router sees of it, [b S, H]."""
        for span, (number, _, x) in zip(self._spans(), self.inputs.expert_blocks(self.unit), strict=True):
            yield number, span, x.flatten(0, 1)

    def _blocks(self, given: HiddenStates) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        ops = self.inputs.operators(self.unit)

        def read(states: HiddenStates, number: int) -> torch.Tensor:
            return self.inputs.experts.output(ops, states.read(number).to(self.inputs.device).flatten(0, 1))

        for number, span in enumerate(self._spans()):
            yield span, read(self._target, number), read(given, number)

    def _spans(self) -> Iterator[slice]:
        """The place of every block among all tokens."""
        first = 0
        for windows, length, _ in self._target.shapes:
            yield slice(first, first + windows * length)
            first += windows * length

    def _down(self, expert: int) -> str:
        return expert_stem(self.inputs, expert) + DOWN


def _ridge(moments: torch.Tensor, cross: torch.Tensor, damping: float) -> torch.Tensor | None:
    """The D [H, F] of least |r - z D'|^2 + lambda |D|^2 from z'z [F, F] (overwritten) and z'r [F, H]; lambda is `damping` x the
    mean of the diagonal, raised tenfold while rounding keeps the sum from being positive definite."""
    ridge = damping * float(moments.diagonal().mean())
    while 0 < ridge < math.inf:
        moments.diagonal().add_(ridge)
        factored, failed = torch.linalg.cholesky_ex(moments)
        if not failed:
            return torch.cholesky_solve(cross, factored).T
        ridge *= 10
    return None


def _scaled(weight: Weight, scale: float) -> Weight:
    """A matrix times a factor, in its own number format."""

    def load(rows: slice | None = None) -> torch.Tensor:
        return (weight.dense(rows) * scale).to(PLAIN_DTYPES[weight.format])

    return weight.with_load(weight.format, load)
