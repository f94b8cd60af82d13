"""A hybrid model as the rest of the code sees it: units of lazily read weights, each with a role and a format.

Nothing here holds a weight. A `Weight` knows its name, role, shape and stored format, and loads itself (or a block of
its rows) when asked; passes replace weights by others that load themselves through a transformation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from compress import formats
from compress.formats import hadamard
from compress.formats.activations import Activation
from compress.formats.base import Layout, Part, Parts, Quantized
from compress.model.roles import Role

Stored = torch.Tensor | Quantized
PLAIN_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PLAIN_DTYPES = {name: dtype for dtype, name in PLAIN_FORMATS.items()}
BLOCK_BYTES = (
    4 << 20
)  # of float32: matrices are worked on in blocks of rows of about this size, which stay in the cache
INPUT_SCALE = "input_scale"


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
    """One logical tensor. `load(rows)` returns it as stored: a plain tensor, or values and scales.

    `activation` says how the input of a quantized matrix is rounded, where it is. With a `rotation` of n, what is stored
    is the matrix times a Hadamard matrix in blocks of n, to be multiplied with the input rotated likewise. `scale_dtype` is that of
    scales in the file they were read from, where they were stored in another than the format's.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    format: str
    load: Callable[[slice | None], Stored]
    activation: Activation | None = None
    rotation: int | None = None
    scale_dtype: torch.dtype | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        return self.format not in PLAIN_DTYPES

    def dense(self, rows: slice | None = None) -> torch.Tensor:
        """The tensor (or rows of it) as float32, rotated back where it is stored rotated."""
        dense = to_dense(self.load(rows))
        return hadamard.rotate(dense, self.rotation) if self.rotation else dense

    def with_load(self, format: str, load: Callable[[slice | None], Stored]) -> "Weight":
        """Another content in the model's own basis: neither rotated, nor with an input that is rounded."""
        return replace(self, format=format, load=load, activation=None, rotation=None, scale_dtype=None)

    def with_scales_in(self, dtype: torch.dtype | None) -> "Weight":
        """The same with scales rounded to a type; itself where that is None, or there are none."""
        if dtype is None or not self.is_quantized:
            return self

        def load(rows: slice | None = None) -> Stored:
            stored = self.load(rows)
            assert isinstance(stored, Quantized), self.name
            return replace(stored, scales=stored.scales.to(dtype).to(torch.float32))

        return replace(self, load=load, scale_dtype=dtype)

    def rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        """The input x [..., K] as a kernel that rounds it sees it, in the model's own basis."""
        if self.activation is None:
            return x
        if self.rotation is None:
            return self.activation.fake_quantize(x)
        return hadamard.rotate(self.activation.fake_quantize(hadamard.rotate(x, self.rotation)), self.rotation)

    def row_blocks(self) -> Iterator[slice]:
        """Slices over dimension 0, each about BLOCK_BYTES of float32, that cut no block of rows which share a scale."""
        step = (formats.get(self.format).rows or 1) if self.is_quantized else 1
        rows = max(1, BLOCK_BYTES // (4 * max(1, self.parameters // self.shape[0]) * step)) * step
        for start in range(0, self.shape[0], rows):
            yield slice(start, min(start + rows, self.shape[0]))

    @property
    def stem(self) -> str:
        """What the names of the tensors that store it begin with, where it is quantized."""
        return self.name.removesuffix("weight")

    @property
    def is_packed(self) -> bool:
        """int8 beside int8 activations is stored as it is multiplied; small integers are packed otherwise."""
        return self.activation is None

    def layout(self) -> Layout:
        """Names, dtypes and shapes of the tensors that store it."""
        if not self.is_quantized:
            return {self.name: Part(PLAIN_DTYPES[self.format], self.shape)}
        parts = formats.get(self.format).layout(self.shape, packed=self.is_packed)
        if self.activation and self.activation.is_static:
            parts = {**parts, INPUT_SCALE: Part(torch.float32, (1,), None)}
        return {self.stem + suffix: part for suffix, part in parts.items()}

    def stored_parts(self, stored: Stored) -> Parts:
        """The tensors to write for what `load` returned for a block of rows."""
        if not isinstance(stored, Quantized):
            return {self.name: stored}
        parts = formats.get(stored.format).pack(stored, self.shape, packed=self.is_packed)
        if self.activation and self.activation.scale is not None:
            parts[INPUT_SCALE] = torch.tensor([self.activation.scale()], dtype=torch.float32)
        return {self.stem + suffix: part for suffix, part in parts.items()}

    def stored_bytes(self) -> int:
        return sum(part.bytes for part in self.layout().values())


def to_dense(stored: Stored) -> torch.Tensor:
    if isinstance(stored, Quantized):
        return formats.get(stored.format).dequantize(stored)
    return stored.to(torch.float32)


def is_finite(tensor: torch.Tensor) -> bool:
    """No NaN and no infinity. (Both show in the extremes, which are found thirty times as fast as by `isfinite`; fp8 has
    no kernel for either, and E4M3's only NaN has all bits but the sign set.)"""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.dtype == torch.float8_e4m3fn:
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    least, most = torch.aminmax(tensor)
    return math.isfinite(least) and math.isfinite(most)


@dataclass(frozen=True)
class Unit:
    """The weights of the embedding, of one layer or of the head, by full name, in a fixed order."""

    name: str
    weights: dict[str, Weight]

    def map(self, function: Callable[[Weight], Weight]) -> "Unit":
        return Unit(self.name, {name: function(weight) for name, weight in self.weights.items()})

    def replaced(self, weight: Weight) -> "Unit":
        """The same unit with one weight in place of that of its name."""
        return Unit(self.name, {**self.weights, weight.name: weight})

    def stored_bytes(self) -> int:
        return sum(weight.stored_bytes() for weight in self.weights.values())
