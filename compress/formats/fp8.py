"""fp8 E4M3 (OCP OFP8, arXiv 2209.05433): 4 exponent and 3 mantissa bits, largest magnitude 448, no infinity.

    fp8-e4m3         one float32 scale per output channel (row)
    fp8-e4m3-tensor  one float32 scale
    fp8-e4m3-b128    one float32 scale per block of 128x128, partial ones at the edges

Values beyond 448 saturate. Stored as compressed-tensors' `float-quantized`: the values themselves beside the scales.
"""

from dataclasses import dataclass

import torch

from compress.formats.base import Layout, NumberFormat, Part, Parts, Quantized, Scheme

LARGEST = 448.0


def saturated(scaled: torch.Tensor) -> torch.Tensor:
    """The nearest values of E4M3; what lies beyond its range becomes its largest."""
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Fp8E4M3(NumberFormat):
    @property
    def absmax(self) -> float:
        return LARGEST

    def to_grid(self, scaled: torch.Tensor) -> torch.Tensor:
        return saturated(scaled)

    def layout(self, shape: tuple[int, ...], *, packed: bool = True) -> Layout:
        scale_shape = (1,) if self.rows is None else self.scales_shape(shape)
        return {
            "weight": Part(torch.float8_e4m3fn, tuple(shape)),
            "weight_scale": Part(self.scale_dtype, scale_shape, self.rows),
        }

    def pack(self, quantized: Quantized, shape: tuple[int, ...], *, packed: bool = True) -> Parts:
        scales = quantized.scales
        return {"weight": quantized.values, "weight_scale": scales.view(1) if self.rows is None else scales}

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Quantized:
        scales = parts["weight_scale"]
        return Quantized(parts["weight"], scales.view(1, 1) if self.rows is None else scales, self.name)

    def scheme(self) -> Scheme:
        kind: Scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
        if self.columns is not None:
            return kind | {"strategy": "block", "block_structure": [self.rows, self.columns]}
        return kind | {"strategy": "tensor" if self.rows is None else "channel"}


FORMATS = {
    "fp8-e4m3": Fp8E4M3("fp8-e4m3", 1, None),
    "fp8-e4m3-tensor": Fp8E4M3("fp8-e4m3-tensor", None, None),
    "fp8-e4m3-b128": Fp8E4M3("fp8-e4m3-b128", 128, 128),
}
