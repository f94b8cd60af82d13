"""What a quantized matrix is, independent of its number format."""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Part(NamedTuple):
    """One stored tensor of a weight, known without data. `by_row`: its rows belong to the rows of the weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    by_row: bool = True

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def rows(self, rows: slice | None) -> slice | None:
        """The part's rows for a block of the weight's rows; None is all of it."""
        return rows if self.by_row else None


Parts = dict[str, torch.Tensor]  # suffix of the stored tensor's name -> tensor
Layout = dict[str, Part]  # suffix (or whole name) -> what is stored there


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix [N, K] or a block of its rows: `values` as integers, `scales` to multiply them with."""

    values: torch.Tensor
    scales: torch.Tensor
    format: str


class NumberFormat(Protocol):
    """Pure functions on tensors; rows are independent, so any block of rows may be treated alone."""

    name: str

    def quantize(self, weight: torch.Tensor) -> Quantized:
        """float32 [n, K] -> values and scales, round to nearest (ties to even)."""

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        """-> float32 [n, K]."""

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The tensors that store a matrix of this shape."""

    def pack(self, quantized: Quantized, shape: tuple[int, ...]) -> Parts:
        """The stored tensors of a block of rows of a matrix of `shape` (rows of a part belong to rows of the matrix)."""

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Quantized:
        """The inverse of `pack`."""

    def scheme(self) -> dict:
        """The compressed-tensors `weights` arguments that describe it."""
