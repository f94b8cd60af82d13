"""`parallel`: mixers side by side on the same input, their outputs weighted and summed (Falcon-H1, arXiv 2507.22448)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar, TypeVar

from compress.model.block import Block, Fold, Level
from compress.model.experts import Experts
from compress.model.operators import Operators
from compress.model.states import StateSpec
from compress.model.weight import Spec

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel(Block):
    """Blocks with distinct names of tensors and states, and what each counts."""

    kind: ClassVar[str] = "parallel"

    branches: tuple[tuple[Block, float], ...]

    @property
    def experts(self) -> Experts | None:
        """Of the branch that has them."""
        return next((block.experts for block in self._blocks if block.experts is not None), None)

    def members(self) -> tuple[tuple[Block, float], ...]:
        return tuple((block, factor * inner) for branch, factor in self.branches for block, inner in branch.members())

    @property
    def _blocks(self) -> list[Block]:
        return [block for block, _ in self.branches]

    def specs(self) -> Iterator[Spec]:
        for block in self._blocks:
            yield from block.specs()

    def states(self) -> tuple[StateSpec, ...]:
        return tuple(spec for block in self._blocks for spec in block.states())

    def levels(self) -> tuple[Level, ...]:
        """The n-th levels of all branches together."""
        together = zip_longest(*(block.levels() for block in self._blocks), fillvalue=())
        return tuple(tuple(group for level in levels for group in level) for levels in together)

    def folds(self, norm: str) -> tuple[Fold, ...]:
        """What the norm feeds is divided in all branches at once."""
        folds = [fold for block in self._blocks for fold in block.folds(norm)]
        entering, inner = ([f for f in folds if (f.source == norm) is is_norm] for is_norm in (True, False))
        targets, others = (tuple(name for fold in entering for name in fold[part]) for part in (1, 2))
        whole = all(any(f.source == norm for f in block.folds(norm)) for block in self._blocks)
        return (*((Fold(norm, targets, others),) if whole else ()), *inner)

    def run(self, ops: Operators[T], x: T, state: dict[str, T]) -> tuple[T, dict[str, T]]:
        total: T | None = None
        new: dict[str, T] = {}
        for block, factor in self.branches:
            given, found = block.run(ops, x, state)
            given = given if factor == 1 else ops.scale(given, factor)
            total = given if total is None else ops.add(total, given)
            new |= found
        if total is None:
            raise ValueError("a parallel block needs a branch")
        return total, new
