"""int8, symmetric, one float32 scale per output channel (row of the [N, K] weight).

    scale[n] = max_k |w[n, k]| / 127        q[n, k] = round(w[n, k] / scale[n])  in -127 .. 127

Round to nearest, ties to even. The worst error of an element is scale / 2. A row of zeros has scale 1 and values 0.
Stored as compressed-tensors' `pack-quantized`: four values to an int32, lowest byte first, each offset by 128,
a row padded with zero bytes to a whole number of int32.
"""

import torch

from compress.formats.base import Layout, Part, Parts, Quantized

QMAX, OFFSET, PER_WORD = 127, 128, 4


class Int8:
    name = "int8"

    def quantize(self, weight: torch.Tensor) -> Quantized:
        absmax = weight.abs().amax(dim=1, keepdim=True)
        # a row so small that its scale underflows counts as zeros
        scales = torch.where(absmax > QMAX * torch.finfo(torch.float32).tiny, absmax / QMAX, 1.0)
        values = torch.round(weight / scales).clamp_(-QMAX, QMAX).to(torch.int8)
        return Quantized(values, scales, self.name)

    def dequantize(self, quantized: Quantized) -> torch.Tensor:
        return quantized.values.to(torch.float32) * quantized.scales

    def layout(self, shape: tuple[int, ...]) -> Layout:
        rows, columns = shape
        return {
            "weight_packed": Part(torch.int32, (rows, -(-columns // PER_WORD))),
            "weight_scale": Part(torch.float32, (rows, 1)),
            "weight_shape": Part(torch.int64, (2,), by_row=False),
        }

    def pack(self, quantized: Quantized, shape: tuple[int, ...]) -> Parts:
        rows, columns = quantized.values.shape
        padded = torch.zeros(rows, -(-columns // PER_WORD) * PER_WORD, dtype=torch.uint8)
        padded[:, :columns] = (quantized.values.to(torch.int16) + OFFSET).to(torch.uint8)
        return {
            "weight_packed": padded.view(torch.int32),
            "weight_scale": quantized.scales,
            "weight_shape": torch.tensor(shape, dtype=torch.int64),
        }

    def unpack(self, parts: Parts, shape: tuple[int, ...]) -> Quantized:
        unsigned = parts["weight_packed"].view(torch.uint8)[:, : shape[1]]
        return Quantized((unsigned.to(torch.int16) - OFFSET).to(torch.int8), parts["weight_scale"], self.name)

    def scheme(self) -> dict:
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}


FORMATS = {"int8": Int8()}
