"""How numbers that a model remembers are stored between calls: recurrent states, convolution states, the KV cache.

    fp32, bf16, fp16    the type itself
    int8                INT8, whole numbers from -127 to 127 times a scale
    int4                UINT8, whole numbers from -7 to 7 in two's complement, times a scale; two to a byte: entry i below
                        entry i + n/2
    fp8-e4m3            FLOAT8E4M3FN times a scale

Bytes of 0 are numbers of exactly 0 in each of them: runtimes begin with such a past, whatever its type.

`block` entries along `axis` share a scale (all of them, where it is None). A static scale is fixed by calibration and stored
with the weights. A dynamic one is that of the entries it serves, and rides with them in two bytes: in more entries along the axis,
two for each block (four of fp8, which holds whole numbers below 16 only), first all the first ones, and so on. What is stored
is a whole number k, in digits: the scale is 2^(k / 1024 - 44), the nearest to absmax / 127 (7, 448).

Scales must be fine and unbiased. Where a state decays slowly, a grid that stands still gives the same value back every time, and
one that is rounded up makes it grow: with a byte times a power of two, rounded up, nearest int8 was 2.5 times and fp8 twenty times
worse on the reference model.

**Rounding.** `nearest`, ties to even; or `stochastic`: floor(v + u), with a dither u in [0, 1) that is a function of the
position (real tokens read) and the place of the entry alone:

    u = ((40503 position + 30011 place + seed) mod 65536 + 1/2) / 65536

In fp8, bf16 and fp16 v counts steps of the grid where it lies: 2^(exponent - bits of the mantissa).

40503 / 65536 is nearly the golden ratio's fraction, so over time the dithers of an entry are spread as evenly as may be (Weyl's
sequence), and rounding errors of one sign cannot pile up.

`error_feedback` rounds to nearest and stores what that loses as well, the `residual`, as a state of its own with dynamic scales:
the next call begins with the sum of both.

**Cadence.** `every` tokens a state is rounded; in between it stays as it was stored, and the inputs since are kept in 16 bits
(`model/carrying.py`).

A state that stands still stays as it is stored, in whatever order float32 arithmetic is done: no u is 0, and the largest entry, a
whole number of scales, gives the scale it had.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats import fp8
from compress.formats.state_words import Format, Residual, Rounding, Scale

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = {**PLAIN, "fp8-e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
MOST = {"int8": 127, "int4": 7, "fp8-e4m3": fp8.LARGEST}
SCALE_ENTRIES = {"int8": 2, "int4": 2, "fp8-e4m3": 4}  # that a dynamic scale takes
DIGITS = {"int8": (256, 128), "int4": (256, 0), "fp8-e4m3": (16, 0)}  # base, and what is taken off
NIBBLE = 16  # values of half a byte
POWER_STEPS = 1024  # scales are whole powers of 2^(1/1024), from
LEAST_POWER, MOST_POWER = -44, 19  # of two, on
PARTS = np.exp2(np.arange(POWER_STEPS) / POWER_STEPS).astype(np.float32)
FLOATS = {
    "fp8-e4m3": (3, -6),
    "fp16": (10, -14),
    "bf16": (7, -100),
}  # bits of the mantissa, and the least exponent with a grid
STEPS = (40503, 30011, 1 << 16)  # of the dither, and its period


@dataclass(frozen=True)
class Precision:
    """How one state is stored; `axis` counts from the end of its shape."""

    format: Format = "fp32"
    rounding: Rounding = "nearest"
    scale: Scale = "dynamic"
    axis: int = -1
    block: int | None = None
    seed: int = 0
    residual: Residual | None = None  # the format of what rounding loses, where that is kept
    every: int = 1  # tokens between two roundings

    @property
    def is_plain(self) -> bool:
        return self.format in PLAIN

    @property
    def has_static_scale(self) -> bool:
        return not self.is_plain and self.scale == "static"

    @property
    def dtype(self) -> torch.dtype:
        return STORED[self.format]

    def of_residual(self) -> "Precision | None":
        """How what rounding loses is stored."""
        return None if self.residual is None else Precision(self.residual, axis=self.axis, block=self.block)

    def blocks(self, size: int) -> int:
        """Of an axis of so many entries; the last may be shorter."""
        return 1 if self.block is None else -(-size // self.block)

    def stored_size(self, size: int) -> int:
        """Entries along the axis as they are stored."""
        if self.is_plain:
            return size
        values = -(-size // 2) if self.format == "int4" else size
        return values + (SCALE_ENTRIES[self.format] * self.blocks(size) if self.scale == "dynamic" else 0)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _with(shape, self.axis, self.stored_size(shape[self.axis]))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales of one sequence's state (or of one token of a cache)."""
        return _with(shape, self.axis, self.blocks(shape[self.axis]))


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[axis] = size
    return tuple(sizes)


def encode(value: Tensor, precision: Precision, position: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
    """value [B, ...] as it is stored. `position`, which stochastic rounding asks for, broadcasts against it; `scales` are the
    static ones, in `scale_shape`."""
    dithers = None
    if precision.rounding == "stochastic":
        assert position is not None, "the dither is that of a position"
        dithers = dither(value.shape, position, precision.seed)
    if precision.is_plain:
        return (value if dithers is None else _dithered(value, dithers, precision.format)).to(precision.dtype)
    size, codes = value.shape[precision.axis], tuple[Tensor, ...]()
    values = _blocked(value.movedim(precision.axis, -1), precision)  # [..., blocks, block]
    if scales is None:
        codes, scale = _dynamic(values.abs().amax(-1, keepdim=True), precision)
    else:
        scale = scales.movedim(precision.axis, -1)[..., None]
    if dithers is not None:
        dithers = _blocked(dithers.movedim(precision.axis, -1), precision)
    whole = _on_grid(values / scale, precision.format, dithers).flatten(-2)[..., :size]
    stored = torch.cat([_packed(whole, precision.format), *(code.squeeze(-1) for code in codes)], -1)
    return stored.to(precision.dtype).movedim(-1, precision.axis)


def decode(stored: Tensor, precision: Precision, size: int, scales: Tensor | None = None) -> Tensor:
    """What was stored, as float32; `size` entries lie along the axis."""
    if precision.is_plain:
        return stored.float()
    entries = stored.movedim(precision.axis, -1).float()
    blocks, values = precision.blocks(size), -(-size // 2) if precision.format == "int4" else size
    whole = _blocked(_unpacked(entries[..., :values], precision.format)[..., :size], precision)
    if scales is None:
        scale = _scale(entries[..., values:].unflatten(-1, (-1, blocks)), precision.format)[..., None]
    else:
        scale = scales.movedim(precision.axis, -1)[..., None]
    return (whole * scale).flatten(-2)[..., :size].movedim(-1, precision.axis)


def dither(shape: torch.Size, position: Tensor, seed: int) -> Tensor:
    """u in [0, 1) for every entry of a tensor [B, ...]; entries at the same place of a token of a cache have the same place:
    where `position` varies along an axis, the place does not count it."""
    by_position, by_place, period = STEPS
    own = [1 if position.shape[axis] > 1 or axis == 0 else size for axis, size in enumerate(shape)]
    places = torch.arange(torch.Size(own).numel(), device=position.device).view(own)
    return (((by_position * position.long() + by_place * places + seed) % period).float() + 0.5) / period


def static_scales(absmax: Tensor, precision: Precision) -> Tensor:
    """Scales with which nothing of these magnitudes saturates: of one sequence's state, as `scale_shape` has them."""
    blocks = _blocked(absmax.movedim(precision.axis, -1), precision).amax(-1)
    return (blocks / MOST[precision.format]).clamp_min(2.0**LEAST_POWER).movedim(-1, precision.axis)


def _blocked(values: Tensor, precision: Precision) -> Tensor:
    """[..., n] -> [..., blocks, block], zeros at the end."""
    block = precision.block or values.shape[-1]
    blocked: Tensor = F.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))
    return blocked


def _dynamic(absmax: Tensor, precision: Precision) -> tuple[tuple[Tensor, ...], Tensor]:
    """The entries that hold the scale, and the scale."""
    least = (absmax / MOST[precision.format]).clamp(2.0**LEAST_POWER, 2.0**MOST_POWER)
    code = torch.round((torch.log2(least) - LEAST_POWER) * POWER_STEPS)
    return _digits(code, precision.format), _power(code)


def _digits(code: Tensor, format: Format) -> tuple[Tensor, ...]:
    """A number below 2^16 in entries of the stored type, the highest digit first."""
    base, shift = DIGITS[format]
    found = []
    for _ in range(SCALE_ENTRIES[format]):
        higher = torch.floor(code / base)
        found.append(code - base * higher - shift)
        code = higher
    return tuple(reversed(found))


def _scale(digits: Tensor, format: Format) -> Tensor:
    """From its entries [..., entries, blocks]: [..., blocks]."""
    base, shift = DIGITS[format]
    powers = base ** torch.arange(SCALE_ENTRIES[format] - 1, -1, -1, device=digits.device)
    code = ((digits + shift) * powers[:, None]).sum(-2)
    return _power(code)


def _power(code: Tensor) -> Tensor:
    """2^(k / 1024 - 44), from tables: no two runtimes have the same last bit of a power."""
    whole = torch.floor(code / POWER_STEPS)
    parts = torch.from_numpy(PARTS).to(code.device)[(code - POWER_STEPS * whole).long()]
    return torch.ldexp(parts, (whole + LEAST_POWER).int())


def _on_grid(scaled: Tensor, format: Format, dithers: Tensor | None) -> Tensor:
    most = MOST[format]
    if format == "fp8-e4m3":
        scaled = scaled if dithers is None else _dithered(scaled.clamp(-most, most), dithers, format)
        return fp8.saturated(scaled).float()
    rounded = torch.round(scaled) if dithers is None else torch.floor(scaled + dithers)
    return rounded.clamp(-most, most)


def _dithered(value: Tensor, dithers: Tensor, format: Format) -> Tensor:
    """Rounded down or up to a number that the format has, by the dither. What lies on the grid stays: the dither is added to
    the rest alone, so that no sum is rounded."""
    bits, least = FLOATS[format]
    exponent = (torch.frexp(value).exponent - 1).clamp_min(least)
    steps = torch.ldexp(value, bits - exponent)
    below = torch.floor(steps)
    return torch.ldexp(below + torch.floor(steps - below + dithers), exponent - bits)


def _packed(whole: Tensor, format: Format) -> Tensor:
    """int4 values two to a byte."""
    if format != "int4":
        return whole
    half = -(-whole.shape[-1] // 2)
    nibbles = _wrapped(F.pad(whole, (0, 2 * half - whole.shape[-1])))
    return nibbles[..., :half] + NIBBLE * nibbles[..., half:]


def _unpacked(entries: Tensor, format: Format) -> Tensor:
    if format != "int4":
        return entries
    high = torch.floor(entries / NIBBLE)
    return _wrapped(torch.cat([entries - NIBBLE * high, high], -1))


def _wrapped(whole: Tensor) -> Tensor:
    """-8 to 7 as 0 to 15 and back: two's complement in four bits."""
    return whole - NIBBLE * torch.floor(whole / (NIBBLE // 2))
