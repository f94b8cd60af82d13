"""How numbers that a model remembers are stored between calls: recurrent states, convolution states, the KV cache.

    fp32, bf16, fp16    the type itself
    int8                INT8, whole numbers from -127 to 127 times a scale
    int4                UINT8, whole numbers from -7 to 7 in two's complement, times a scale; two to a byte: entry i below
                        entry i + n/2
    fp8-e4m3            FLOAT8E4M3FN times a scale

Bytes of 0 are numbers of exactly 0 in each of them: runtimes begin with such a past, whatever its type.

`block` entries along `axis` share a scale (all of them, where it is None). A static scale is fixed by calibration and stored
with the weights. A dynamic one is that of the entries it serves, and rides with them, in two more entries along the axis for
each block: first all the first ones, then all the second ones. For whole numbers it is m 2^e, a byte m (with an offset of 128
in INT8) and an exponent e (with an offset of 128 in UINT8), rounded up, so that nothing saturates; for fp8 it is f 2^(14 c), f an fp8
number and c a small whole one, which fp8 holds exactly. (A power of two alone would be a grid that stands still while the state
moves slowly: every step then rounds to the same value, and nearest rounding is some twenty times worse.)

**Rounding.** `nearest`, ties to even; or `stochastic`: floor(v + u), with a dither u in [0, 1) that is a function of the
position (real tokens read) and the place of the entry alone:

    u = ((40503 position + 30011 place + seed) mod 65536 + 1/2) / 65536

40503 / 65536 is nearly the golden ratio's fraction, so over time the dithers of an entry are spread as evenly as may be (Weyl's
sequence), and rounding errors of one sign cannot pile up.

A state that stands still must stay as it is stored, in whatever order float32 arithmetic is done: so no u is 0, and a scale is
rounded up only from a thousandth of its own step on. (Else the largest entry, which is a whole number of scales, would lie on
the very edge, and two runtimes would part there.)
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.formats import fp8

Format = Literal["fp32", "bf16", "fp16", "fp8-e4m3", "int8", "int4"]
Rounding = Literal["nearest", "stochastic"]
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = {**PLAIN, "fp8-e4m3": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}
MOST = {"int8": 127, "int4": 7, "fp8-e4m3": fp8.LARGEST}
SCALE_ENTRIES = 2  # that a dynamic scale takes
OFFSET = 128  # of bytes
NIBBLE = 16  # values of half a byte
LEAST_EXPONENT, MOST_EXPONENT = -126, 119  # of m 2^e in float32
SLACK = 2.0**-10  # of a step of a scale's mantissa
FP8_POWER = 14  # of two, that the second entry of an fp8 scale counts
STEPS = (40503, 30011, 1 << 16)  # of the dither, and its period


@dataclass(frozen=True)
class Precision:
    """How one state is stored; `axis` counts from the end of its shape."""

    format: Format = "fp32"
    rounding: Rounding = "nearest"
    scale: Literal["dynamic", "static"] = "dynamic"
    axis: int = -1
    block: int | None = None
    seed: int = 0

    @property
    def is_plain(self) -> bool:
        return self.format in PLAIN

    @property
    def has_static_scale(self) -> bool:
        return not self.is_plain and self.scale == "static"

    @property
    def dtype(self) -> torch.dtype:
        return STORED[self.format]

    def blocks(self, size: int) -> int:
        """Of an axis of so many entries; the last may be shorter."""
        return 1 if self.block is None else -(-size // self.block)

    def stored_size(self, size: int) -> int:
        """Entries along the axis as they are stored."""
        if self.is_plain:
            return size
        values = -(-size // 2) if self.format == "int4" else size
        return values + (SCALE_ENTRIES * self.blocks(size) if self.scale == "dynamic" else 0)

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return _with(shape, self.axis, self.stored_size(shape[self.axis]))

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the scales of one sequence's state (or of one token of a cache)."""
        return _with(shape, self.axis, self.blocks(shape[self.axis]))


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[axis] = size
    return tuple(sizes)


def encode(value: Tensor, precision: Precision, position: Tensor, scales: Tensor | None = None) -> Tensor:
    """value [B, ...] as it is stored. `position` broadcasts against it; `scales` are the static ones, in `scale_shape`."""
    if precision.is_plain:
        return value.to(precision.dtype)
    size, codes = value.shape[precision.axis], tuple[Tensor, ...]()
    values = _blocked(value.movedim(precision.axis, -1), precision)  # [..., blocks, block]
    if scales is None:
        codes, scale = _dynamic(values.abs().amax(-1, keepdim=True), precision)
    else:
        scale = scales.movedim(precision.axis, -1)[..., None]
    dithers = None
    if precision.rounding == "stochastic":
        dithers = _blocked(dither(value.shape, position, precision.seed).movedim(precision.axis, -1), precision)
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
        first, second = entries[..., values : values + blocks], entries[..., values + blocks :]
        scale = _scale(first, second, precision.format)[..., None]
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


def _blocked(values: Tensor, precision: Precision) -> Tensor:
    """[..., n] -> [..., blocks, block], zeros at the end."""
    block = precision.block or values.shape[-1]
    blocked: Tensor = F.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))
    return blocked


def _dynamic(absmax: Tensor, precision: Precision) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The two entries that hold the scale, and the scale."""
    if precision.format == "fp8-e4m3":
        least = (absmax / fp8.LARGEST).clamp_min(2.0**LEAST_EXPONENT)
        power = torch.floor((torch.log2(least) + 6) / FP8_POWER)
        rest = least * torch.exp2(-FP8_POWER * power)
        step = torch.exp2(torch.floor(torch.log2(rest)) - 3)  # of numbers with three bits behind the first
        codes = torch.ceil(rest / step - SLACK) * step, power
    else:
        least = (absmax / MOST[precision.format]).clamp_min(2.0 ** (LEAST_EXPONENT + 7))
        exponent = torch.floor(torch.log2(least)) - 7
        mantissa = torch.ceil(least * torch.exp2(-exponent) - SLACK)
        above = mantissa > 255
        mantissa, exponent = torch.where(above, 128.0, mantissa), torch.where(above, exponent + 1, exponent)
        shift = OFFSET if precision.format == "int8" else 0
        codes = mantissa - shift, exponent + (OFFSET - shift)
    return codes, _scale(*codes, precision.format)


def _scale(first: Tensor, second: Tensor, format: Format) -> Tensor:
    if format == "fp8-e4m3":
        return first * torch.exp2(FP8_POWER * second)
    shift = OFFSET if format == "int8" else 0
    return (first + shift) * torch.exp2(second - (OFFSET - shift))


def _on_grid(scaled: Tensor, format: Format, dithers: Tensor | None) -> Tensor:
    most = MOST[format]
    if format == "fp8-e4m3":
        return fp8.saturated(scaled).float()
    rounded = torch.round(scaled) if dithers is None else torch.floor(scaled + dithers)
    return rounded.clamp(-most, most)


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
