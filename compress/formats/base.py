"""What a quantized matrix is, and what every number format does with one: pure functions on tensors.

A matrix [N, K] is divided into blocks of `rows` x `columns` that share a scale (None: all of them), so its scales are a
matrix too, [ceil(N / rows), ceil(K / columns)]:

    per tensor 1 x 1,  per channel N x 1,  groups of g  N x K/g,  blocks of 128x128  ceil(N/128) x ceil(K/128)

    value = round(w / scale) on the format's grid        w' = value * scale
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from compress.strict.json_text import Json

STEPS = 255  # of a byte: a narrow scale is 1 .. 255 times a power of two
LEAST_STEPS = (
    4  # the smallest scale must be so many steps: rounding it moves it by an eighth at most, or a quarter upwards
)


class Part(NamedTuple):
    """One stored tensor of a weight, known without data. `row_step` rows of the weight belong to one of its rows;
    None: it belongs to the whole weight."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    row_step: int | None = 1

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def rows(self, rows: slice | None) -> slice | None:
        """The part's rows for a block of the weight's rows (which begins on a multiple of the step); None is all of it."""
        if rows is None or self.row_step is None:
            return None
        return slice(rows.start // self.row_step, -(-rows.stop // self.row_step))


Parts = dict[str, torch.Tensor]  # suffix of the stored tensor's name -> tensor
Scheme = dict[str, Json]  # compressed-tensors' arguments that describe a format
Layout = dict[str, Part]  # suffix (or whole name) -> what is stored there


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix [N, K] or a block of its rows: `values` on the format's grid, `scales` to multiply them with."""

    values: torch.Tensor
    scales: torch.Tensor
    format: str


@dataclass(frozen=True)
class NumberFormat(ABC):
    """A grid of values, how its scales are shared, and how both are stored. `rows`, `columns`: None is all of them."""

    name: str
    rows: int | None
    columns: int | None
    scale_dtype: torch.dtype = torch.float32

    @property
    @abstractmethod
    def absmax(self) -> float:
        """The value that the largest magnitude of a block is mapped to, before rounding."""

    @abstractmethod
    def to_grid(self, scaled: torch.Tensor) -> torch.Tensor:
        """float32 w / scale -> the nearest values of the grid (ties to even), saturating, in the stored type. The argument
        may be overwritten."""

    @abstractmethod
    def layout(self, shape: tuple[int, ...], *, packed: bool = True) -> Layout:
        """The tensors that store a matrix of this shape; `packed` where compressed-tensors packs small integers."""

    @abstractmethod
    def pack(self, quantized: Quantized, shape: tuple[int, ...], *, packed: bool = True) -> Parts:
        """The stored tensors of a block of rows of a matrix of `shape`."""

    @abstractmethod
    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Quantized:
        """The inverse of `pack`."""

    @abstractmethod
    def scheme(self) -> Scheme:
        """The compressed-tensors `weights` arguments that describe it."""

    @property
    def is_narrow(self) -> bool:
        """Whether scales are stored in fewer than 32 bits, and so are rounded over the whole tensor at once."""
        return self.scale_dtype != torch.float32

    @property
    def rounds_scales_up(self) -> bool:
        """Whether a narrow scale may not be less than what reaches the largest magnitude: a fine grid would saturate by
        more than it rounds."""
        return False

    @property
    def rows_are_independent(self) -> bool:
        return self.rows == 1 and not self.is_narrow

    def applies_to(self, shape: tuple[int, ...]) -> bool:
        """Groups must divide K; blocks and whole rows fit anything."""
        return self.rows != 1 or self.columns is None or shape[1] % self.columns == 0

    def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = shape
        return _steps(rows, self.rows), _steps(columns, self.columns)

    def block_absmax(self, weight: torch.Tensor) -> torch.Tensor:
        """Largest magnitude of each block of [n, K]."""
        rows, columns = self.rows or weight.shape[0], self.columns or weight.shape[1]
        blocks = blocked(weight, rows, columns)
        return torch.maximum(blocks.amax(dim=(1, 3)), -blocks.amin(dim=(1, 3)))

    def absmax_scales(self, weight: torch.Tensor) -> torch.Tensor:
        """Scales that just reach the largest magnitudes; 0 for a block of zeros (or one so small that it underflows)."""
        absmax = self.block_absmax(weight)
        return torch.where(absmax > self.absmax * torch.finfo(torch.float32).tiny, absmax / self.absmax, 0.0)

    def join_scales(self, scales: Iterable[torch.Tensor]) -> torch.Tensor:
        """The scales of a whole matrix from those of its blocks of rows, ready to use: narrow, and positive everywhere."""
        pieces = list(scales)
        joined = torch.stack(pieces).amax(0) if self.rows is None else torch.cat(pieces)
        positive = joined > 0
        least = joined[positive].min() if bool(positive.any()) else joined.new_tensor(1.0)
        # a block of zeros takes a scale that others have: it must not widen the range that narrow scales span
        filled = torch.where(positive, joined, least if self.is_narrow else joined.new_tensor(1.0))
        return narrow(filled, self.scale_dtype, up=self.rounds_scales_up) if self.is_narrow else filled

    def scales_of(self, scales: torch.Tensor, rows: slice) -> torch.Tensor:
        """Those of a whole matrix's scales that a block of its rows has (it begins where blocks that share one do)."""
        return scales if self.rows is None else scales[rows.start // self.rows : -(-rows.stop // self.rows)]

    def expand(self, scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Scales as a tensor that broadcasts over [n, K]."""
        for dim, step in ((0, self.rows), (1, self.columns)):
            if step not in (None, 1):
                scales = scales.repeat_interleave(step, dim).narrow(dim, 0, shape[dim])
        return scales

    def quantize(self, weight: torch.Tensor, scales: torch.Tensor | None = None) -> Quantized:
        """float32 [n, K] -> the nearest values, with the given scales or with those that reach the largest magnitudes."""
        if scales is None:
            scales = self.join_scales([self.absmax_scales(weight)])
        return Quantized(self.to_grid(weight / self.expand(scales, weight.shape)), scales, self.name)

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        """-> float32 [n, K]."""
        values = quantized.values
        return values.to(torch.float32) * self.expand(quantized.scales, values.shape)


def _steps(size: int, step: int | None) -> int:
    return 1 if step is None else -(-size // step)


def blocked(tensor: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[n, K] -> [n / rows, rows, K / columns, columns], partial blocks filled up with zeros."""
    missing = (-tensor.shape[0] % rows, -tensor.shape[1] % columns)
    if any(missing):
        tensor = F.pad(tensor, (0, missing[1], 0, missing[0]))
    blocks: torch.Tensor = tensor.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return blocks


def narrow(scales: torch.Tensor, dtype: torch.dtype, *, up: bool) -> torch.Tensor:
    """Positive scales rounded (`up`, or to nearest) so that they can be stored in a byte: 1 .. 255 steps of a power of two.

    Eight significant bits are exact in bfloat16 too, so a checkpoint holds the identical values. Where the scales of a
    tensor span so wide a range that the smallest would be few steps, all are rounded to `dtype` instead.
    """
    step = byte_step(scales)
    steps = torch.ceil(scales / step) if up else torch.round(scales / step)
    if bool((steps >= LEAST_STEPS).all()):
        return steps * step
    rounded = scales.to(dtype)
    if up:
        next_up = torch.nextafter(rounded, torch.tensor(torch.inf, dtype=dtype, device=rounded.device))
        rounded = torch.where(rounded.to(torch.float32) < scales, next_up, rounded)
    return rounded.to(torch.float32)


def byte_step(scales: torch.Tensor) -> float:
    """The power of two of which the largest scale is at most 255 steps."""
    return 2.0 ** math.ceil(math.log2(float(scales.max()) / STEPS))
