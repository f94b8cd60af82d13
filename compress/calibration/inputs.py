"""What reaches the matrices of a unit, pulled by replaying it over the calibration tokens.

A layer is replayed in halves, and of the experts only those that are asked for: statistics are collected for as many
groups of matrices at a time as fit into a budget, so that memory does not grow with the number of experts. Where
matrices of the unit have been quantized already, what they give is what the later ones see.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from compress.calibration.moments import SAMPLE_ROWS, Moments
from compress.checkpoint.writer import ShardWriter
from compress.model.hybrid import HybridModel, InputGroup
from compress.model.layers import rms_norm
from compress.model.weight import Unit, Weight
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
    it was written."""

    def __init__(self, model: HybridModel, index: int, entering: HiddenStates, folder: Path, keep: Keep, device: str):
        self.architecture, self.index, self.device = model.architecture, index, device
        self._entering, self._folder, self._mixed = entering, folder, entering.at(folder / "mixed")
        self.keep, self._mixer_used, self._stashes = keep, None, 0
        self.prefix = model.architecture.layer_prefix(index)
        self.become(model)

    def become(self, model: HybridModel) -> None:
        """From now on the layer is that of another model: the one a pass has made of it."""
        self.config = model.config
        self._groups = model.architecture.input_groups(model.config, self.index)

    @property
    def levels(self) -> tuple[tuple[InputGroup, ...], ...]:
        """Groups of matrices by depth: the inputs of a level depend on the matrices of earlier ones only."""
        return (*self._groups.mixer, *self._groups.feed_forward)

    def folds(self):
        return self.architecture.folds(self.config, self.index)

    def full_names(self, group: InputGroup) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in group.names)

    def moments(
        self, unit: Unit, groups: tuple[InputGroup, ...], wanted: Wanted
    ) -> Iterator[tuple[InputGroup, Moments]]:
        """Statistics of the inputs of groups of one level, as many at a time as the budget allows."""
        for batch in _batches(unit, self.prefix, groups, wanted):
            found = {group: self._empty(unit, group, wanted) for group in batch}
            if groups[0] in {group for level in self._groups.mixer for group in level}:
                self._replay_mixer(unit, found)
            else:
                self._replay_feed_forward(unit, found)
            yield from found.items()

    def moments_of_every_token(self, unit: Unit, group: InputGroup, wanted: Wanted) -> Moments:
        """The same for the matrices of one expert, were all tokens of the layer routed to it."""
        moments, rows = self._empty(unit, group, wanted), 0
        weights = self.weights(unit, {group: moments})
        for number in range(len(self._mixed)):
            if rows >= EVERY_TOKEN_ROWS:
                break
            x = self.architecture.feed_forward_input(self.config, weights, self._mixed.read(number).to(self.device))
            self.architecture.expert(weights, group.expert, x.flatten(0, 1))
            rows += x.shape[0] * x.shape[1]
        return moments

    def leave(self, unit: Unit, following: HiddenStates) -> None:
        """Runs the finished layer and writes the states that enter the next one."""
        self._mix(unit)
        weights = self.weights(unit)
        for number in range(len(self._mixed)):
            hidden = self._mixed.read(number).to(self.device)
            following.write(number, self.architecture.feed_forward(self.config, self.index, weights, hidden))
        shutil.rmtree(self._folder)

    def feed_forward_blocks(self, unit: Unit) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Block by block: its number, the states [b, S, H] that enter the second half of the layer, and what its router
        and experts see of them."""
        self._mix(unit)
        weights = self.weights(unit)
        for number in range(len(self._mixed)):
            hidden = self._mixed.read(number).to(self.device)
            yield number, hidden, self.architecture.feed_forward_input(self.config, weights, hidden)

    def scratch(self, name: str) -> HiddenStates:
        """Room on disk for another set of states of this layer; gone when the layer is left."""
        return self._entering.at(self._folder / name)

    def stash(self, unit: Unit) -> ShardWriter:
        """Room on disk for new weights of the unit, in its names, formats and shapes; gone when the layer is left. Each
        pass has its own: a later one reads what an earlier one wrote."""
        self._stashes += 1
        return ShardWriter(unit, self._folder / f"weights-{self._stashes}.safetensors")

    def _empty(self, unit: Unit, group: InputGroup, wanted: Wanted) -> Moments:
        names = self.full_names(group)
        return wanted.moments(unit.weights[names[0]].shape[1], self.device, names)

    def weights(self, unit: Unit, found: dict[InputGroup, Moments] | None = None) -> LayerWeights:
        """The unit's weights for arithmetic, adding up in `found` what reaches them."""
        by_name = {group.names[0]: moments for group, moments in (found or {}).items()}

        def tap(name: str, x: torch.Tensor) -> None:
            if name in by_name:
                by_name[name].add(x, self.prefix + name)
                if len(by_name) == 1 and next(iter(found)).expert is None:
                    raise _Seen  # the rest of this block's replay, such as the scan, would be for nothing

        return LayerWeights(unit, self.prefix, self.device, tap=tap if found else None)

    def _replay_mixer(self, unit: Unit, found: dict[InputGroup, Moments]) -> None:
        weights = self.weights(unit, found)
        for number in range(len(self._entering)):
            with contextlib.suppress(_Seen):
                self._run_mixer(weights, self._entering.read(number))

    def _replay_feed_forward(self, unit: Unit, found: dict[InputGroup, Moments]) -> None:
        self._mix(unit)
        weights, experts = self.weights(unit, found), {group.expert for group in found}
        for number in range(len(self._mixed)):
            hidden = self._mixed.read(number).to(self.device)
            with contextlib.suppress(_Seen):
                self.architecture.feed_forward(self.config, self.index, weights, hidden, only=experts - {None} or None)

    def _mix(self, unit: Unit) -> None:
        """Hidden states after the mixer, made again only where the mixer's weights are others than last time."""
        names = {self.prefix + name for level in self._groups.mixer for group in level for name in group.names}
        used = [id(weight) for name, weight in unit.weights.items() if name in names]
        if used == self._mixer_used:
            return
        weights = self.weights(unit)
        for number in range(len(self._entering)):
            self._mixed.write(number, self._run_mixer(weights, self._entering.read(number)))
        self._mixer_used, self._held = used, unit  # the unit is held so that ids stay its own

    def _run_mixer(self, weights: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.to(self.device)
        state = self.architecture.initial_state(self.config, self.index, hidden.shape[0], self.device)
        return self.architecture.mix(self.config, self.index, weights, hidden, state)[0]


class HeadInputs:
    """The input of the output matrix `name`, where the unit has it: hidden states after the last layer, normalised.
    `final` gives those states, block by block, every time it is called."""

    prefix = ""

    def __init__(self, model: HybridModel, name: str | None, final: Callable[[], Iterator[torch.Tensor]], keep: Keep,
                 device: str, own_error: float = 0.0):  # fmt: skip
        self._model, self._final, self.device, self.keep, self._own_error = model, final, device, keep, own_error
        self.levels = ((InputGroup((name,)),),) if name else ()

    def folds(self):
        return ()

    def become(self, model: HybridModel) -> None:
        """No pass changes which tensors the head, or the embedding, has."""

    def full_names(self, group: InputGroup) -> tuple[str, ...]:
        return group.names

    def moments(
        self, unit: Unit, groups: tuple[InputGroup, ...], wanted: Wanted
    ) -> Iterator[tuple[InputGroup, Moments]]:
        norm = self._model.unit("head").weights[self._model.architecture.FINAL_NORM].dense().to(self.device)
        for group in groups:
            moments = wanted.moments(unit.weights[group.names[0]].shape[1], self.device, group.names)
            for hidden in self._final():
                moments.add(rms_norm(hidden.to(self.device), norm, self._model.config.rms_norm_eps), group.names[0])
            moments.count_own_error(self._own_error)
            yield group, moments


def of_head(model: HybridModel, entering: HiddenStates, keep: Keep, device: str) -> HeadInputs:
    """What reaches the head; nothing to look at where the output matrix is the embedding."""
    name = model.architecture.LM_HEAD
    return HeadInputs(model, name if name in model.unit("head").weights else None, entering.read_all, keep, device)


def of_tied_head(
    model: HybridModel, windows: list[torch.Tensor], folder: Path, keep: Keep, device: str
) -> HeadInputs | None:
    """What reaches the embedding as an output matrix; None where it is none.

    It is written first, since every layer is calibrated on what the written table gives, but what reaches it comes last:
    so the model is run once as it came. docs/quantization.md says how little that differs.
    """
    if model.architecture.LM_HEAD in model.unit("head").weights:
        return None

    def final() -> Iterator[torch.Tensor]:
        folder.mkdir(parents=True, exist_ok=True)
        steps = sum(map(len, windows)) * model.config.num_hidden_layers
        with progress.task("what reaches the output matrix", steps) as advance:
            for _, hidden in stream(model, windows, folder, device=device, advance=advance):
                yield hidden
        shutil.rmtree(folder)

    return HeadInputs(model, model.architecture.EMBEDDING, final, keep, device, LOOKUP_SHARE)


UnitInputs = LayerInputs | HeadInputs


def _batches(unit: Unit, prefix: str, groups, wanted: Wanted) -> Iterator[list[InputGroup]]:
    """Groups whose second moments fit into the budget together; at least one."""
    batch, taken = [], 0
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
