"""A hybrid model as the rest of the code sees it: units of lazily read weights, each with a role and a format.

Nothing here holds a weight. A `Weight` knows its name, role, shape and stored format, and loads itself (or a block of
its rows) when asked; passes replace weights by others that load themselves through a transformation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from compress import formats
from compress.formats.base import Layout, Part, Quantized
from compress.roles import Role

Stored = torch.Tensor | Quantized
PLAIN_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PLAIN_DTYPES = {name: dtype for dtype, name in PLAIN_FORMATS.items()}
BLOCK_BYTES = 64 << 20  # of float32: matrices are worked on in blocks of rows of about this size


@dataclass(frozen=True)
class Spec:
    """What an architecture expects of one tensor."""

    name: str
    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True)
class UnitSpec:
    """A group of tensors that is read, transformed and written together: the embedding, one layer, or the head."""

    name: str
    specs: tuple[Spec, ...]


@dataclass(frozen=True)
class Weight:
    """One logical tensor. `load(rows)` returns it as stored: a plain tensor, or values and scales."""

    name: str
    role: Role
    shape: tuple[int, ...]
    format: str
    load: Callable[[slice | None], Stored]

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        return self.format not in PLAIN_DTYPES

    def dense(self, rows: slice | None = None) -> torch.Tensor:
        """The tensor (or rows of it) as float32."""
        return to_dense(self.load(rows))

    def with_load(self, format: str, load: Callable[[slice | None], Stored]) -> "Weight":
        return replace(self, format=format, load=load)

    def row_blocks(self) -> Iterator[slice]:
        """Slices over dimension 0, each about BLOCK_BYTES of float32."""
        rows = max(1, BLOCK_BYTES // (4 * max(1, self.parameters // self.shape[0])))
        for start in range(0, self.shape[0], rows):
            yield slice(start, min(start + rows, self.shape[0]))

    def layout(self) -> Layout:
        """Names, dtypes and shapes of the tensors that store it."""
        if not self.is_quantized:
            return {self.name: Part(PLAIN_DTYPES[self.format], self.shape)}
        stem = self.name.removesuffix("weight")
        return {stem + suffix: part for suffix, part in formats.get(self.format).layout(self.shape).items()}

    def stored_bytes(self) -> int:
        return sum(part.bytes for part in self.layout().values())


def to_dense(stored: Stored) -> torch.Tensor:
    if isinstance(stored, Quantized):
        return formats.get(stored.format).dequantize(stored)
    return stored.to(torch.float32)


@dataclass(frozen=True)
class Unit:
    """The weights of the embedding, of one layer or of the head, by full name, in a fixed order."""

    name: str
    weights: dict[str, Weight]

    def map(self, function: Callable[[Weight], Weight]) -> "Unit":
        return Unit(self.name, {name: function(weight) for name, weight in self.weights.items()})

    def stored_bytes(self) -> int:
        return sum(weight.stored_bytes() for weight in self.weights.values())


@dataclass(frozen=True)
class HybridModel:
    """An opened model: its architecture module, its validated configuration and its units in order of computation."""

    architecture: ModuleType
    config: object
    units: tuple[Unit, ...]

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    @property
    def model_type(self) -> str:
        return self.architecture.__name__.rpartition(".")[2]

    @property
    def weights(self) -> Iterator[Weight]:
        return (weight for unit in self.units for weight in unit.weights.values())

    @property
    def parameters(self) -> int:
        return sum(weight.parameters for weight in self.weights)
