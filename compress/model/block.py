"""What a layer is made of: residual blocks  h += multiplier * block(norm(h)).

A block is one file in `blocks/`: a frozen dataclass of sizes and names that knows its tensors, its states, which matrices share
an input, and its arithmetic in `Operators`.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, NamedTuple, TypeVar

from compress.errors import InputError
from compress.formats.remembered import Precision
from compress.model import carrying
from compress.model.experts import Experts
from compress.model.operators import Operators
from compress.model.roles import Role
from compress.model.states import StateSpec
from compress.model.weight import Spec

T = TypeVar("T")


class InputGroup(NamedTuple):
    """Matrices of a layer that multiply the same input; `expert` is the one they belong to."""

    names: tuple[str, ...]
    expert: int | None = None


Level = tuple[InputGroup, ...]


class Fold(NamedTuple):
    """`source` (a norm, or a matrix by its rows) produces, channel by channel, the input of the matrices `targets`.

    `others` see the same input and are never quantized."""

    source: str
    targets: tuple[str, ...]
    others: tuple[str, ...] = ()


class Block(ABC):
    """One branch of a layer, on what its norm gives. Names of tensors are within the layer."""

    kind: ClassVar[str]  # what people call it

    @abstractmethod
    def specs(self) -> Iterator[Spec]:
        """Its tensors, in the order in which they are stored."""

    @abstractmethod
    def run(self, ops: Operators[T], x: T, state: dict[str, T]) -> tuple[T, dict[str, T]]:
        """x [B, S, H], the layer's states by name -> [B, S, H], and the new ones of this block."""

    @abstractmethod
    def levels(self) -> tuple[Level, ...]:
        """Its matrices by the input they share, level by level: a level's inputs depend on the matrices of earlier levels
        only. A group is known by its first name."""

    def states(self) -> tuple[StateSpec, ...]:
        """What it carries from call to call."""
        return ()

    def folds(self, norm: str) -> tuple[Fold, ...]:
        """Where a factor per channel can move from the input of matrices into what produces it, the norm in front of the
        block to begin with, without a change of output."""
        return ()

    @property
    def experts(self) -> Experts | None:
        """Where tokens are routed to experts: what pruning and surveys speak to."""
        return None

    def members(self) -> tuple[tuple["Block", float], ...]:
        """The blocks that do the work, and what the output of each counts: itself, or those it puts side by side."""
        return ((self, 1.0),)


@dataclass(frozen=True)
class Residual:
    """h + multiplier * block(rms_norm(h))."""

    norm: str
    block: Block
    eps: float
    multiplier: float = 1.0

    def normed(self, ops: Operators[T], hidden: T) -> T:
        """What the block sees."""
        return ops.rms_norm(hidden, self.norm, self.eps)

    def run(self, ops: Operators[T], hidden: T, state: dict[str, T]) -> tuple[T, dict[str, T]]:
        """hidden [B, S, H] -> the same after the block, and the block's new states."""
        given, state = self.block.run(ops, self.normed(ops, hidden), state)
        return ops.add(hidden, given if self.multiplier == 1 else ops.scale(given, self.multiplier)), state


@dataclass(frozen=True)
class Layer:
    """`prefix` is what the names of its tensors begin with."""

    index: int
    prefix: str
    hidden_size: int
    residuals: tuple[Residual, ...]
    precisions: Mapping[str, Precision] = field(default_factory=dict)  # of states that are not kept in float32, by name

    def __post_init__(self) -> None:
        """Raises InputError for what would be run or stored wrong without a word: it names the layer."""
        with_experts = [block for block in self.blocks if block.experts]
        if len(with_experts) > 1:
            raise InputError(f"layer {self.index} has {len(with_experts)} blocks with experts, expected one at most")
        names = Counter(spec.name for spec in self.carried)
        if twice := [name for name, count in names.items() if count > 1]:
            raise InputError(f"layer {self.index} has several states '{twice[0]}'; expected another name for each")

    @property
    def kind(self) -> str:
        """Of its first block: the mixer, where it has one."""
        return self.residuals[0].block.kind

    @cached_property
    def states(self) -> tuple[StateSpec, ...]:
        """What its blocks remember, in the precisions in which that is kept."""
        specs = (spec for residual in self.residuals for spec in residual.block.states())
        return tuple(replace(spec, precision=self.precisions.get(spec.name, spec.precision)) for spec in specs)

    @property
    def carried(self) -> tuple[StateSpec, ...]:
        """The tensors it carries from call to call: of a state one, or several."""
        return tuple(part for spec in self.states for part in spec.parts)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Those that do the work, in order."""
        return tuple(block for residual in self.residuals for block, _ in residual.block.members())

    @cached_property
    def experts(self) -> Experts | None:
        """Of its block that has them."""
        return next((block.experts for block in self.blocks if block.experts is not None), None)

    @property
    def experts_factor(self) -> float:
        """What the output of the block with experts counts in the hidden states; 1 where there is none."""
        members = ((r, block, share) for r in self.residuals for block, share in r.block.members())
        return next((r.multiplier * share for r, block, share in members if block.experts is not None), 1.0)

    @property
    def num_experts(self) -> int:
        """1 where there is nothing to route to."""
        return self.experts.count if self.experts else 1

    def specs(self) -> Iterator[Spec]:
        """Its tensors by full name, in the order in which they are stored: each norm, then its block."""
        for residual in self.residuals:
            for spec in (Spec(residual.norm, (self.hidden_size,), Role.NORM), *residual.block.specs()):
                yield Spec(self.prefix + spec.name, spec.shape, spec.role)
        for state in self.states:
            if state.precision.has_static_scale:
                yield Spec(self.prefix + state.scale_name, state.scale_shape, Role.STATE_SCALE)

    def folds(self) -> tuple[Fold, ...]:
        return tuple(fold for residual in self.residuals for fold in residual.block.folds(residual.norm))

    def active_share(self, role: Role) -> float:
        """The share of its tensors of a role that works on one token: top-k of the experts, all of anything else."""
        experts = self.experts
        return experts.router.top_k / experts.count if experts and role == Role.EXPERTS else 1.0

    def restored(self, ops: Operators[T], kept: Mapping[str, T]) -> dict[str, T]:
        """What a call begins with, by name, from states as they were kept."""
        found = dict[str, T]()
        for spec in self.states:
            found |= carrying.begun(ops, spec, kept)
        return found

    def run(self, ops: Operators[T], hidden: T, kept: dict[str, T]) -> tuple[T, dict[str, T]]:
        """The whole layer on hidden [B, S, H], from states as they were kept to states as they are kept."""
        given, state, new, left = hidden, self.restored(ops, kept), dict[str, T](), dict[str, T]()
        for residual in self.residuals:
            hidden, found = residual.run(ops, hidden, state)
            new |= found
        for spec in self.states:
            left |= carrying.ended(ops, spec, given, new, kept)
        return hidden, left
