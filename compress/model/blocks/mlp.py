"""`mlp`: a dense feed-forward, gated (SwiGLU: Shazeer, arXiv 2002.05202) or with a squared ReLU (So et al., arXiv 2109.08668).

One expert of a mixture is one too, as is an expert that every token goes to.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from compress.model.block import Block, Fold, InputGroup, Level
from compress.model.operators import Operators
from compress.model.roles import Role
from compress.model.weight import Spec

T = TypeVar("T")


@dataclass(frozen=True)
class Mlp(Block):
    """Gated: down(silu(gate(x)) * up(x)); else down(relu(up(x))^2)."""

    kind: ClassVar[str] = "mlp"

    prefix: str
    hidden_size: int
    inner: int
    gated: bool
    bias: bool = False
    role: Role = Role.MLP

    @property
    def parts(self) -> tuple[str, ...]:
        """Its matrices within it; the last gives the output."""
        return tuple(f"{name}_proj.weight" for name in self._entering) + ("down_proj.weight",)

    @property
    def _entering(self) -> tuple[str, ...]:
        return ("gate", "up") if self.gated else ("up",)

    def specs(self) -> Iterator[Spec]:
        for name in (*self._entering, "down"):
            rows, columns = (self.hidden_size, self.inner) if name == "down" else (self.inner, self.hidden_size)
            yield Spec(f"{self.prefix}{name}_proj.weight", (rows, columns), self.role)
            if self.bias:
                yield Spec(f"{self.prefix}{name}_proj.bias", (rows,), self.role)

    def groups(self, expert: int | None = None) -> tuple[InputGroup, InputGroup]:
        """The matrices on its input, and those on what they give."""
        *entering, down = (self.prefix + part for part in self.parts)
        return InputGroup(tuple(entering), expert), InputGroup((down,), expert)

    def levels(self) -> tuple[Level, ...]:
        return tuple((group,) for group in self.groups())

    def inner_folds(self) -> tuple[Fold, ...]:
        """Into the rows of `up`, where what it gives enters `down` times a factor and nothing else."""
        return (Fold(f"{self.prefix}up_proj.weight", self.groups()[1].names),) if self.gated and not self.bias else ()

    def folds(self, norm: str) -> tuple[Fold, ...]:
        return Fold(norm, self.groups()[0].names), *self.inner_folds()

    def run(self, ops: Operators[T], x: T, state: dict[str, T]) -> tuple[T, dict[str, T]]:
        return self.give(ops, x), {}

    def give(self, ops: Operators[T], x: T) -> T:
        return self._linear(ops, "down", self.hidden(ops, x))

    def hidden(self, ops: Operators[T], x: T) -> T:
        """What its last matrix multiplies, [..., F]."""
        if not self.gated:
            return ops.squared_relu(self._linear(ops, "up", x))
        gate = ops.silu(self._linear(ops, "gate", x))
        return ops.multiply(gate, self._linear(ops, "up", x))

    def _linear(self, ops: Operators[T], name: str, x: T) -> T:
        bias = f"{self.prefix}{name}_proj.bias" if self.bias else None
        return ops.linear(f"{self.prefix}{name}_proj.weight", x, bias)
