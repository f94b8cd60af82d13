"""`attention`: causal, with grouped key-value heads, with rotary positions or none."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from compress.model.block import Block, Fold, InputGroup, Level
from compress.model.operators import Operators
from compress.model.roles import Role
from compress.model.states import StateKind, StateSpec
from compress.model.weight import Spec

T = TypeVar("T")


@dataclass(frozen=True)
class Attention(Block):
    kind: ClassVar[str] = "attention"

    prefix: str
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    rotary: float | None = None  # the base of rotary positions

    def specs(self) -> Iterator[Spec]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        rows = {"q": queries, "k": keys, "v": keys, "o": self.hidden_size}
        for name, size in rows.items():
            columns = queries if name == "o" else self.hidden_size
            role = Role.ATTENTION_OUT if name == "o" else Role.ATTENTION_QKV
            yield Spec(self._name(name), (size, columns), role)
            if self.bias:
                yield Spec(self._name(name, "bias"), (size,), role)

    def _name(self, projection: str, part: str = "weight") -> str:
        return f"{self.prefix}{projection}_proj.{part}"

    def states(self) -> tuple[StateSpec, ...]:
        shape = (self.kv_heads, 0, self.head_dim)
        return tuple(StateSpec(name, StateKind.KV, shape, grows=1) for name in ("key", "value"))

    def levels(self) -> tuple[Level, ...]:
        return (InputGroup(tuple(map(self._name, "qkv"))),), (InputGroup((self._name("o"),)),)

    def folds(self, norm: str) -> tuple[Fold, ...]:
        return (Fold(norm, self.levels()[0][0].names),)

    def run(self, ops: Operators[T], x: T, state: dict[str, T]) -> tuple[T, dict[str, T]]:
        query, key, value = (self._linear(ops, name, x) for name in "qkv")
        mixed, key, value = ops.attention(query, key, value, state["key"], state["value"], self.rotary)
        return self._linear(ops, "o", mixed), {"key": key, "value": value}

    def _linear(self, ops: Operators[T], name: str, x: T) -> T:
        return ops.linear(self._name(name), x, self._name(name, "bias") if self.bias else None)
