"""`moe`: a sparse mixture of experts, with an expert that every token goes to where the family has one, and with a projection
into a smaller space around the routed ones (LatentMoE) where it has that."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, TypeVar

from compress.model.block import Block, Fold, InputGroup, Level
from compress.model.blocks.mlp import Mlp
from compress.model.experts import Experts
from compress.model.operators import Operators
from compress.model.roles import Role
from compress.model.routing import Router
from compress.model.weight import Spec

T = TypeVar("T")


@dataclass(frozen=True)
class Latent:
    """Matrices into the experts' space and out of it."""

    size: int
    enter: str
    leave: str
    bias: bool = False

    @staticmethod
    def bias_of(name: str) -> str:
        return name.removesuffix("weight") + "bias"


@dataclass(frozen=True)
class Moe(Block, Experts):
    """`experts_prefix` stands before an expert's number. All experts have the shape of `inner` and are gated or not."""

    kind: ClassVar[str] = "moe"

    experts_prefix: str
    hidden_size: int
    inner: int
    count: int
    router: Router
    gated: bool
    shared: Mlp | None = None
    latent: Latent | None = None

    @property
    def experts(self) -> "Moe":
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        return self._expert(0).parts

    def prefix(self, expert: int) -> str:
        return f"{self.experts_prefix}{expert}."

    def _expert(self, number: int) -> Mlp:
        width = self.latent.size if self.latent else self.hidden_size
        return Mlp(self.prefix(number), width, self.inner, self.gated, role=Role.EXPERTS)

    def specs(self) -> Iterator[Spec]:
        router = self.router
        yield Spec(router.weight, (router.rows, self.hidden_size), Role.ROUTER)
        if router.bias:
            yield Spec(router.bias, (self.count,), Role.ROUTER)
        yield from chain.from_iterable(self._expert(e).specs() for e in range(self.count))
        if self.shared:
            yield from self.shared.specs()
        if self.latent:
            yield from self._latent_specs(self.latent)

    def _latent_specs(self, latent: Latent) -> Iterator[Spec]:
        for name, rows, columns in (
            (latent.enter, latent.size, self.hidden_size),
            (latent.leave, self.hidden_size, latent.size),
        ):
            yield Spec(name, (rows, columns), Role.MOE_LATENT)
            if latent.bias:
                yield Spec(latent.bias_of(name), (rows,), Role.MOE_LATENT)

    def levels(self) -> tuple[Level, ...]:
        """The projections stand in levels of their own: what they give is the experts' input."""
        pairs = [self._expert(e).groups(e) for e in range(self.count)]
        first, second = (tuple(groups) for groups in zip(*pairs, strict=True))
        if self.shared:
            entering, down = self.shared.groups()
            first, second = (entering, *first), (down, *second)
        if not self.latent:
            return first, second
        return (InputGroup((self.latent.enter,)),), first, second, (InputGroup((self.latent.leave,)),)

    def folds(self, norm: str) -> tuple[Fold, ...]:
        """The norm before a mixture feeds the router too, which is divided along with the experts: routing stays as it was."""
        experts = [self._expert(e) for e in range(self.count)]
        shared = [self.shared] if self.shared else []
        seeing = (self.latent.enter,) if self.latent else tuple(n for e in experts for n in e.groups()[0].names)
        seeing += tuple(name for mlp in shared for name in mlp.groups()[0].names)
        inner = chain.from_iterable(mlp.inner_folds() for mlp in (*experts, *shared))
        return Fold(norm, seeing, (self.router.weight,)), *inner

    def run(self, ops: Operators[T], x: T, state: dict[str, T]) -> tuple[T, dict[str, T]]:
        beside = self.beside(ops, x)  # first: a replay that looks at the shared expert alone ends there
        summed = ops.mixture(
            x, self.inputs(ops, x), self.router, self.count, lambda e, rows: self.run_one(ops, e, rows)
        )
        given = self.output(ops, summed)
        return (given if beside is None else ops.add(given, beside)), {}

    def inputs(self, ops: Operators[T], x: T) -> T:
        if not self.latent:
            return x
        return ops.linear(self.latent.enter, x, self.latent.bias_of(self.latent.enter) if self.latent.bias else None)

    def hidden(self, ops: Operators[T], expert: int, rows: T) -> T:
        return self._expert(expert).hidden(ops, rows)

    def run_one(self, ops: Operators[T], expert: int, rows: T) -> T:
        return self._expert(expert).give(ops, rows)

    def output(self, ops: Operators[T], summed: T) -> T:
        return ops.linear(self.latent.leave, summed) if self.latent else summed

    def beside(self, ops: Operators[T], x: T) -> T | None:
        given = self.shared.give(ops, x) if self.shared else None
        if self.latent and self.latent.bias:
            given = ops.scale(x, 0.0) if given is None else given
            given = ops.add_weight(given, self.latent.bias_of(self.latent.leave))
        return given
