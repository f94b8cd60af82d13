"""What the integer formats share: a symmetric grid, and compressed-tensors' `pack-quantized` storage.

Values are packed into int32 words, lowest bits first, each offset by half the range; a row is padded to whole words.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from compress.formats.base import Layout, NumberFormat, Part, Parts, Quantized, Scheme

WORD_BITS = 32


@dataclass(frozen=True)
class IntegerFormat(NumberFormat):
    """Symmetric integers of `bits` bits, from `least` on."""

    bits: int = 8
    least: int = -127

    @property
    def most(self) -> int:
        return (1 << self.bits - 1) - 1

    @property
    def absmax(self) -> float:
        """Half the range: 127 for -127 .. 127, 7.5 for -8 .. 7, as compressed-tensors has it."""
        return (self.most - self.least) / 2

    @property
    def rounds_scales_up(self) -> bool:
        return self.bits == 8

    def to_grid(self, scaled: torch.Tensor) -> torch.Tensor:
        return scaled.round_().clamp_(self.least, self.most).to(torch.int8)

    def layout(self, shape: tuple[int, ...], *, packed: bool = True) -> Layout:
        rows, columns = shape
        scale_shape = (1,) if self.rows is None else self.scales_shape(shape)
        scale = Part(self.scale_dtype, scale_shape, self.rows)
        if self._is_plain(packed):
            return {"weight": Part(torch.int8, (rows, columns)), "weight_scale": scale}
        words = -(-columns * self.bits // WORD_BITS)
        return {
            "weight_packed": Part(torch.int32, (rows, words)),
            "weight_scale": scale,
            "weight_shape": Part(torch.int64, (2,), None),
        }

    def pack(self, quantized: Quantized, shape: tuple[int, ...], *, packed: bool = True) -> Parts:
        layout = self.layout(shape, packed=packed)
        scales = quantized.scales.to(self.scale_dtype)
        if self.rows is None:
            scales = scales.view(1)
        if self._is_plain(packed):
            return {"weight": quantized.values, "weight_scale": scales}
        words = pack_words(quantized.values, self.bits, layout["weight_packed"].shape[1])
        return {
            "weight_packed": words,
            "weight_scale": scales,
            "weight_shape": torch.tensor(shape, dtype=torch.int64),
        }

    def _is_plain(self, packed: bool) -> bool:
        return self.bits == 8 and not packed

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Quantized:
        packed = parts.get("weight_packed")
        values = parts["weight"] if packed is None else unpack_words(packed, self.bits, shape[1])
        scales = parts["weight_scale"].to(torch.float32)
        return Quantized(values, scales.view(1, 1) if self.rows is None else scales, self.name)

    def scheme(self) -> Scheme:
        return {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, **self._strategy()}

    def _strategy(self) -> Scheme:
        if self.columns is not None:
            return {"strategy": "group", "group_size": self.columns}
        return {"strategy": "tensor" if self.rows is None else "channel"}


def pack_words(values: torch.Tensor, bits: int, words: int) -> torch.Tensor:
    """int8 [n, K] -> int32 [n, words]."""
    offset = 1 << bits - 1
    # adding half the range to a two's complement number flips its highest bit
    unsigned = values.view(torch.uint8) ^ offset if bits == 8 else (values + offset).view(torch.uint8)
    missing = words * (WORD_BITS // bits) - values.shape[1]
    if missing:
        unsigned = F.pad(unsigned, (0, missing))
    if bits == 4:
        unsigned = pair_nibbles(unsigned)
    return unsigned.view(torch.int32)


def unpack_words(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """int32 [n, words] -> int8 [n, columns]."""
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], dim=-1).flatten(-2)
    return (unsigned[:, :columns].to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def pair_nibbles(unsigned: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 2 k] of 4-bit values -> uint8 [..., k], the first of a pair in the low half."""
    return unsigned[..., 0::2] | (unsigned[..., 1::2] << 4)
