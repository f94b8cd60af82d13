"""What reaches the matrices of a unit, pulled by replaying it over the calibration tokens.

A layer is replayed block by block, and of the experts only those that are asked for: statistics are collected for as many
groups of matrices at a time as fit into a budget, so that memory does not grow with the number of experts. Where
matrices of the unit have been quantized already, what they give is what the later ones see.
"""

import contextlib
import operator
import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from compress.arithmetic.norm import rms_norm
from compress.calibration.moments import SAMPLE_ROWS, Moments
from compress.checkpoint.writer import ShardWriter
from compress.errors import WorkError
from compress.model.block import Fold, InputGroup, Level, Residual
from compress.model.experts import Experts
from compress.model.hybrid import HybridModel
from compress.model.weight import Unit, Weight
from compress.runtime.eager import Eager
from compress.runtime.inference import HiddenStates, LayerWeights, stream
from compress.terminal import progress

Keep = Callable[[Weight], Weight]  # writes a weight; returns one that reads what was written
MOMENT_BYTES = 1 << 30  # of second moments collected in one replay
LOOKUP_SHARE = 0.5  # what the rows of a tied embedding count as looked up, beside what they give as output matrix
EVERY_TOKEN_ROWS = 1 << 16  # rows that are sent through an expert that routing left without enough of them


class _Seen(Exception):  # noqa: N818 - nothing went wrong
    """All that a replay was for has been seen."""


@dataclass(frozen=True)
class Wanted:
    """What a pass wants to know of inputs; those of matrices in `rotations` after a Hadamard rotation in blocks of so many."""

    hessian: bool = False
    sample: bool = False
    rotations: dict[str, int] = field(default_factory=dict)

    def moments(self, width: int, device: str, names: tuple[str, ...]) -> Moments:
        """Empty statistics for the matrices of those full names, which share an input."""
        rotation = next((self.rotations[name] for name in names if name in self.rotations), None)
        return Moments(width, device, with_hessian=self.hessian, with_sample=self.sample, rotation=rotation)

    def bytes(self, width: int) -> int:
        """What the statistics of one input hold at most."""
        return 4 * width * ((width if self.hessian else 1) + (SAMPLE_ROWS if self.sample else 0))


class LayerInputs:
    """The inputs of one layer. `entering` are the hidden states before it; `keep` writes a weight and gives it back as
    it was written.

    Each residual block has hidden states that enter it: for the first they are given, for the others they are computed, and
    wait on disk until a weight before them changes.
    """

    def __init__(self, model: HybridModel, index: int, entering: HiddenStates, folder: Path, keep: Keep, device: str):
        self.index, self.device, self.keep = index, device, keep
        self._folder, self._stashes = folder, 0
        self.become(model)
        blocks = len(self.layer.residuals)
        self._entering = [entering, *(entering.at(folder / f"block-{number}") for number in range(1, blocks))]
        self._made_with: list[list[Weight] | None] = [
            None
        ] * blocks  # the weights that gave the states entering a block

    def become(self, model: HybridModel) -> None:
        """From now on the layer is that of another model: the one a pass has made of it."""
        self.layer = model.layer(self.index)
        self.prefix = self.layer.prefix
        self._levels = [(n, level) for n, r in enumerate(self.layer.residuals) for level in r.block.levels()]

    @property
    def levels(self) -> tuple[Level, ...]:
        """Groups of matrices by depth: the inputs of a level depend on the matrices of earlier ones only."""
        return tuple(level for _, level in self._levels)

    @property
    def experts(self) -> Experts:
        """Of a layer that has them."""
        if self.layer.experts is None:
            raise WorkError(f"layer {self.index} has no experts")
        return self.layer.experts

    def folds(self) -> tuple[Fold, ...]:
        return self.layer.folds()

    def full_names(self, group: InputGroup) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in group.names)

    def moments(self, unit: Unit, groups: Level, wanted: Wanted) -> Iterator[tuple[InputGroup, Moments]]:
        """Statistics of the inputs of groups of one level, as many at a time as the budget allows."""
        number = next(number for number, level in self._levels if groups[0] in level)
        for batch in _batches(unit, self.prefix, groups, wanted):
            yield from self._moments_of(unit, number, batch, wanted)

    def _moments_of(
        self, unit: Unit, place: int, batch: list[InputGroup], wanted: Wanted
    ) -> Iterator[tuple[InputGroup, Moments]]:
        """From one replay, each let go of when it is given: none is left when the next batch's are made."""
        found = {group: self._empty(unit, group, wanted) for group in batch}
        self._replay(unit, place, found)
        for group in batch:
            yield group, found.pop(group)

    def moments_of_every_token(self, unit: Unit, group: InputGroup, wanted: Wanted) -> Moments:
        """The same for the matrices of one expert, were all tokens of the layer routed to it."""
        moments, rows = self._empty(unit, group, wanted), 0
        ops = self.operators(unit, {group: moments})
        for _, _, x in self.expert_blocks(unit):
            if rows >= EVERY_TOKEN_ROWS:
                break
            with contextlib.suppress(_Seen):
                self.experts.run_one(ops, expert_of(group), self.experts.inputs(ops, x).flatten(0, 1))
            rows += x.shape[0] * x.shape[1]
        return moments

    def leave(self, unit: Unit, following: HiddenStates) -> None:
        """Runs the finished layer and writes the states that enter the next one."""
        last, ops = len(self.layer.residuals) - 1, self.operators(unit)
        for number, hidden in self._states(unit, last):
            following.write(number, self._run(ops, last, hidden))
        shutil.rmtree(self._folder, ignore_errors=True)

    def expert_blocks(self, unit: Unit) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Block of windows by block: its number, the states [b, S, H] that enter the part of the layer with experts, and what
        its router sees of them."""
        block = next(n for n, residual in enumerate(self.layer.residuals) if residual.block.experts)
        ops = self.operators(unit)
        for number, hidden in self._states(unit, block):
            yield number, hidden, self.layer.residuals[block].normed(ops, hidden)

    def remembered(self, unit: Unit, names: Container[str]) -> Iterator[dict[str, torch.Tensor]]:
        """What the layer remembers, unrounded, after every token of each block of windows: those states [B, ...] of one of its
        blocks, by name. Where all that is asked for grows, the end tells it all."""
        for place, residual in enumerate(self.layer.residuals):
            wanted = [spec for spec in residual.block.states() if spec.name in names]
            if not wanted:
                continue
            ops, stays = self.operators(unit), any(spec.grows is None for spec in wanted)
            for _, hidden in self._states(unit, place):
                past = self._empty_past(residual, len(hidden))
                for piece in hidden.split(1 if stays else hidden.shape[1], 1):
                    past = residual.run(ops, piece, past)[1]
                    yield {spec.name: past[spec.name] for spec in wanted}

    def scratch(self, name: str) -> HiddenStates:
        """Room on disk for another set of states of this layer; gone when the layer is left."""
        return self._entering[0].at(self._folder / name)

    def stash(self, unit: Unit) -> ShardWriter:
        """Room on disk for new weights of the unit, in its names, formats and shapes; gone when the layer is left. Each
        pass has its own: a later one reads what an earlier one wrote."""
        self._stashes += 1
        self._folder.mkdir(parents=True, exist_ok=True)
        return ShardWriter(unit, self._folder / f"weights-{self._stashes}.safetensors")

    def _empty(self, unit: Unit, group: InputGroup, wanted: Wanted) -> Moments:
        names = self.full_names(group)
        return wanted.moments(unit.weights[names[0]].shape[1], self.device, names)

    def operators(self, unit: Unit, found: dict[InputGroup, Moments] | None = None) -> Eager:
        """The unit's arithmetic, adding up in `found` what reaches its matrices."""
        groups = found or {}
        by_name = {group.names[0]: moments for group, moments in groups.items()}

        def tap(name: str, x: torch.Tensor) -> None:
            if name in by_name:
                by_name[name].add(x, self.prefix + name)
                if len(by_name) == 1:
                    raise _Seen  # the rest of this block's replay, such as the scan, would be for nothing

        weights = LayerWeights(unit, self.prefix, self.device, tap=tap if found else None)
        return Eager(weights, only={g.expert for g in groups if g.expert is not None} or None)

    def _replay(self, unit: Unit, block: int, found: dict[InputGroup, Moments]) -> None:
        ops = self.operators(unit, found)
        for _, hidden in self._states(unit, block):
            with contextlib.suppress(_Seen):
                self._run(ops, block, hidden)

    def _states(self, unit: Unit, block: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The states that enter a residual block, by block of windows."""
        self._compute(unit, block)
        for number in range(len(self._entering[block])):
            yield number, self._entering[block].read(number).to(self.device)

    def _compute(self, unit: Unit, block: int) -> None:
        """Writes the states that enter a residual block, where weights before it are others than last time."""
        if block == 0:
            return
        used = self._weights_before(unit, block)
        made_with = self._made_with[block] or []
        if len(used) == len(made_with) and all(map(operator.is_, used, made_with)):
            return
        ops = self.operators(unit)
        for number, hidden in self._states(unit, block - 1):
            self._entering[block].write(number, self._run(ops, block - 1, hidden))
        self._made_with[block] = used

    def _weights_before(self, unit: Unit, block: int) -> list[Weight]:
        """The matrices of the residual blocks before one: what calibration may have changed."""
        names = (name for number, level in self._levels if number < block for group in level for name in group.names)
        return [unit.weights[self.prefix + name] for name in names]

    def _run(self, ops: Eager, block: int, hidden: torch.Tensor) -> torch.Tensor:
        """One residual block on hidden states [b, S, H], from an empty past."""
        residual = self.layer.residuals[block]
        return residual.run(ops, hidden, self._empty_past(residual, len(hidden)))[0]

    def _empty_past(self, residual: Residual, batch: int) -> dict[str, torch.Tensor]:
        """In float32: where inputs are looked at, states are not rounded."""
        specs = residual.block.states()
        return {spec.name: spec.restored(spec.empty(batch, self.device)) for spec in specs}


def expert_of(group: InputGroup) -> int:
    """The expert a group of its matrices belongs to."""
    if group.expert is None:
        raise WorkError(f"{group.names[0]} belongs to no expert")
    return group.expert


class HeadInputs:
    """The input of the output matrix `name`, where the unit has it: hidden states after the last layer, normalised.
    `final` gives those states, block by block, every time it is called."""

    prefix = ""

    def __init__(self, model: HybridModel, name: str | None, final: Callable[[], Iterator[torch.Tensor]], keep: Keep,
                 device: str, own_error: float = 0.0):  # fmt: skip
        self._model, self._final, self.device, self.keep, self._own_error = model, final, device, keep, own_error
        self.levels: tuple[Level, ...] = ((InputGroup((name,)),),) if name else ()

    def folds(self) -> tuple[Fold, ...]:
        return ()

    def become(self, model: HybridModel) -> None:
        """No pass changes which tensors the head, or the embedding, has."""

    def full_names(self, group: InputGroup) -> tuple[str, ...]:
        return group.names

    def moments(
        self, unit: Unit, groups: tuple[InputGroup, ...], wanted: Wanted
    ) -> Iterator[tuple[InputGroup, Moments]]:
        norm = self._model.final_norm.dense().to(self.device)
        for group in groups:
            moments = wanted.moments(unit.weights[group.names[0]].shape[1], self.device, group.names)
            for hidden in self._final():
                moments.add(rms_norm(hidden.to(self.device), norm, self._model.config.rms_norm_eps), group.names[0])
            moments.count_own_error(self._own_error)
            yield group, moments


def of_head(model: HybridModel, entering: HiddenStates, keep: Keep, device: str) -> HeadInputs:
    """What reaches the head; nothing to look at where the output matrix is the embedding."""
    return HeadInputs(model, None if model.is_tied else model.output_matrix.name, entering.read_all, keep, device)


def of_tied_head(
    model: HybridModel, windows: list[torch.Tensor], folder: Path, keep: Keep, device: str
) -> HeadInputs | None:
    """What reaches the embedding as an output matrix; None where it is none.

    It is written first, since every layer is calibrated on what the written table gives, but what reaches it comes last:
    so the model is run once as it came. docs/quantization.md says how little that differs.
    """
    if not model.is_tied:
        return None

    def final() -> Iterator[torch.Tensor]:
        folder.mkdir(parents=True, exist_ok=True)
        steps = sum(map(len, windows)) * model.config.num_hidden_layers
        with progress.task("what reaches the output matrix", steps) as advance:
            for _, hidden in stream(model, windows, folder, device=device, advance=advance):
                yield hidden
        shutil.rmtree(folder)

    return HeadInputs(model, model.embedding.name, final, keep, device, LOOKUP_SHARE)


UnitInputs = LayerInputs | HeadInputs


def _batches(unit: Unit, prefix: str, groups: Level, wanted: Wanted) -> Iterator[list[InputGroup]]:
    """Groups whose second moments fit into the budget together; at least one."""
    batch: list[InputGroup] = []
    taken = 0
    for group in groups:
        weight: Weight = unit.weights[prefix + group.names[0]]
        need = wanted.bytes(weight.shape[1])
        if batch and taken + need > MOMENT_BYTES:
            yield batch
            batch, taken = [], 0
        batch.append(group)
        taken += need
    if batch:
        yield batch
