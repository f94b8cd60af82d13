"""A weight as it lies in the data file, and the operators that widen it again beside its use.

A matrix [N, K] is stored transposed, [K, N]: only so does onnxruntime fuse DequantizeLinear and MatMul into MatMulNBits.
They fuse only over scales that nothing else uses, and onnxruntime makes one of equal numbers: that is why a single scale
is expanded, to a shape asked from the matrix itself, so that no two are alike until they are computed.
What is computed from weights alone (casts, scales, A = -exp(A_log)) onnxruntime computes once, when a session loads.

    bf16, fp16            the type itself, Cast to float32
    int8, int8-tensor     INT8 (UINT8 where its inputs are int8 too: rounding.py), float32 scales [N] or one
    int8-gN, int4-gN      INT8 or INT4 (two to a byte), scales [K/N, N] in a byte, or in 16 bits
    fp8-e4m3, -tensor     FLOAT8E4M3FN, float32 scales [N] or one
    fp8-e4m3-b128         FLOAT8E4M3FN, float32 scales [K/128, N/128], repeated along N in the graph
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from compress import formats
from compress.formats.base import STEPS, NumberFormat, Quantized, byte_step
from compress.formats.integers import pair_nibbles
from compress.model.weight import PLAIN_DTYPES, Weight
from exporters.graph.builder import DTYPES, Graph

SCALE = "_scale"  # a quantized weight X has its scales beside it as X_scale
TYPES = {name: DTYPES[dtype] for name, dtype in PLAIN_DTYPES.items()}  # of formats without scales
VALUE_TYPES = {
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "fp8": ir.DataType.FLOAT8E4M3FN,
}
Transform = Callable[[torch.Tensor], torch.Tensor]


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def whole(weight: Weight) -> torch.Tensor:
    """A weight without scales as it is stored."""
    tensor = weight.load(None)
    assert isinstance(tensor, torch.Tensor), weight.name
    return tensor


def as_stored(graph: Graph, weight: Weight, transform: Transform = _unchanged) -> ir.Value:
    """A weight without scales in its own type, transformed (such as transposed) before it is stored."""
    return graph.weight(weight.name, weight.format, transform(whole(weight)))


def plain(graph: Graph, weight: Weight, transform: Transform = _unchanged) -> ir.Value:
    """The same in the type of hidden states."""
    return widened(graph, as_stored(graph, weight, transform))


def widened(graph: Graph, value: ir.Value, stored: ir.Value | None = None, to: ir.DataType | None = None) -> ir.Value:
    """A value in the type of hidden states, or another; `stored` is where its own is known from, if it is computed."""
    return graph.cast(value, to or graph.body_type, (stored or value).dtype)


def stacked(graph: Graph, name: str, weights: Sequence[Weight]) -> ir.Value:
    """Matrices [N, K] of one shape and of one type without scales as one weight [E, K, N], read and written one at a time."""
    first = weights[0]
    pieces = (whole(weight).T for weight in weights)
    shape = (len(weights), *reversed(first.shape))
    return graph.stacked(name, first.format, pieces, TYPES[first.format], shape)


def matrix(graph: Graph, weight: Weight) -> ir.Value:
    """weight [N, K] as a value [K, N] in the type of hidden states."""
    if not weight.is_quantized:
        return plain(graph, weight, torch.t)
    number_format, quantized = formats.get(weight.format), load(weight)
    values = store_values(graph, weight, quantized.values.T)
    scales = store_scales(graph, weight, quantized.scales.T)
    return dequantized(graph, values, scales.value(graph), number_format, weight.shape[0])


def load(weight: Weight) -> Quantized:
    """Values [N, K] and scales of a quantized matrix, read in blocks of rows so that nothing else is in memory."""
    values, scales = None, []
    for rows in weight.row_blocks():
        block = weight.load(rows)
        assert isinstance(block, Quantized), weight.name
        if values is None:
            values = torch.empty(weight.shape, dtype=block.values.dtype)
        values[rows] = block.values
        scales.append(block.scales)
    assert values is not None, weight.name  # a matrix has rows
    has_one_scale = formats.get(weight.format).rows is None
    return Quantized(values, scales[0] if has_one_scale else torch.cat(scales), weight.format)


def store_values(graph: Graph, weight: Weight, values: torch.Tensor) -> ir.Value:
    """Values in the order they are given in; int4 two to a byte, as ONNX packs it, the first in the low half."""
    return graph.weight(weight.name, weight.format, packed(values, weight.format), type_of(weight.format), values.shape)


def packed(values: torch.Tensor, number_format: str) -> torch.Tensor:
    """The bytes that values are stored in."""
    return pair_nibbles((values.flatten() & 15).to(torch.uint8)) if number_format.startswith("int4") else values


def type_of(number_format: str) -> ir.DataType:
    """Of the values of a format that has scales."""
    return VALUE_TYPES[number_format.partition("-")[0]]


@dataclass(frozen=True)
class Scales:
    """Scales in the data file; narrow ones are whole numbers of `step`, a power of two."""

    stored: ir.Value
    step: float | None = None

    def widen(self, graph: Graph, value: ir.Value) -> ir.Value:
        """The stored scales, or some of them, in the type of hidden states."""
        value = widened(graph, value, self.stored)
        return value if self.step is None else graph.op("Mul", value, graph.number(self.step))

    def value(self, graph: Graph) -> ir.Value:
        return self.widen(graph, self.stored)


def store_scales(graph: Graph, weight: Weight, scales: torch.Tensor) -> Scales:
    """Scales as they are, in the fewest bytes: one number, one a channel, or a matrix of them."""
    number_format, name = formats.get(weight.format), weight.name + SCALE
    if number_format.rows is None or number_format.columns is None:
        return Scales(graph.stored(name, scales.reshape(() if number_format.rows is None else -1)))
    if not number_format.is_narrow:
        return Scales(graph.stored(name, scales))
    step = byte_step(scales)
    steps = scales / step
    if bool(((steps == steps.round()) & (steps >= 1) & (steps <= STEPS)).all()):
        return Scales(graph.stored(name, steps.to(torch.uint8)), step)
    return Scales(graph.stored(name, scales.to(number_format.scale_dtype)))  # the type they had in the checkpoint


def dequantized(
    graph: Graph, values: ir.Value, scales: ir.Value, number_format: NumberFormat, outputs: int
) -> ir.Value:
    """Stored values [K, N] times their scales -> [K, N] in the type of the scales."""
    rows, columns = number_format.rows, number_format.columns
    if rows is None:
        scales = graph.op("Expand", scales, graph.op("Shape", values, start=1))
    if rows is None or columns is None:
        return graph.op("DequantizeLinear", values, scales, axis=1)
    if rows > 1:
        scales = repeated(graph, scales, rows, outputs, axis=1)
    return graph.op("DequantizeLinear", values, scales, axis=0, block_size=columns)


def repeated(graph: Graph, value: ir.Value, step: int, size: int, axis: int) -> ir.Value:
    """Every entry along `axis` repeated `step` times, `size` of them in all."""
    blocks = graph.once(
        ("blocks", step, size),
        lambda: graph.op("Div", graph.op("Range", *(graph.constant(n) for n in (0, size, 1))), graph.constant(step)),
    )
    return graph.op("Gather", value, blocks, axis=axis)
