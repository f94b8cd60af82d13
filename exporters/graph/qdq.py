"""Quantized matrices and inputs as TensorRT takes them: DequantizeLinear beside every use, and around rounded inputs.

Symmetric and without zero points; scales lie in the type of hidden states, which narrow ones are widened to when they are written.

    int8, int8-tensor     INT8, scales [N] or one
    int8-gN, int4-gN      INT8 or INT4 (two to a byte), scales [K/N, N]
    fp8-e4m3, -tensor     FLOAT8E4M3FN, scales [N] or one
    int8, fp8 inputs      QuantizeLinear and DequantizeLinear with one static scale
"""

import onnx_ir as ir
import torch

from compress import formats
from compress.formats.activations import Activation
from compress.model.weight import Weight
from exporters.graph.builder import TORCH_TYPES, Graph, with_width
from exporters.graph.rotation import rotated
from exporters.graph.stored import SCALE, load, plain, store_values

FP8_BLOCKS = "fp8-e4m3-b128"


def why_not(weight: Weight) -> str | None:
    """What TensorRT has no operator for, in words that follow the name of the tensor, or None."""
    if weight.format == FP8_BLOCKS:
        return f"is {FP8_BLOCKS}; expected fp8-e4m3 or fp8-e4m3-tensor, since TensorRT takes fp8 scales per channel or per tensor"
    if weight.activation is not None and not weight.activation.is_static:
        return (
            "has inputs that are rounded with a scale of their own for each token; expected static ones "
            "(activations: static-int8, or static-fp8)"
        )
    return None


def linear(graph: Graph, x: ir.Value, weight: Weight, bias: Weight | None = None) -> ir.Value:
    """x [..., K], rotated and rounded first where the weight says so, times the transpose of weight [N, K]."""
    y = graph.op("MatMul", input_of(graph, x, weight), matrix(graph, weight))
    return with_width(y if bias is None else graph.op("Add", y, plain(graph, bias)), weight.shape[0])


def input_of(graph: Graph, x: ir.Value, weight: Weight) -> ir.Value:
    """x [..., K] as the product with the stored matrix sees it."""
    x = rotated(graph, x, weight.rotation)
    return x if weight.activation is None else _rounded(graph, x, weight.activation)


def _rounded(graph: Graph, x: ir.Value, activation: Activation) -> ir.Value:
    assert activation.scale is not None, activation.format
    scale = activation.scale()

    def round_and_widen() -> ir.Value:
        dtype, step = ir.DataType.FLOAT8E4M3FN if activation.is_fp8 else ir.DataType.INT8, graph.number(scale)
        return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, step, output_dtype=dtype), step)

    return graph.once(("rounded", x, activation.format, scale), round_and_widen)


def matrix(graph: Graph, weight: Weight) -> ir.Value:
    """weight [N, K] as a value [K, N] in the type of hidden states."""
    if not weight.is_quantized:
        return plain(graph, weight, torch.t)
    quantized = load(weight)
    values = store_values(graph, weight, quantized.values.T)
    return _dequantized(graph, weight, values, quantized.scales.T, channels=1)


def table(graph: Graph, weight: Weight) -> ir.Value:
    """weight [V, H] as it is, dequantized as a whole: rows are gathered after, and the output matrix is its transpose."""
    if not weight.is_quantized:
        return plain(graph, weight)
    quantized = load(weight)
    return _dequantized(graph, weight, store_values(graph, weight, quantized.values), quantized.scales, channels=0)


def _dequantized(graph: Graph, weight: Weight, values: ir.Value, scales: torch.Tensor, channels: int) -> ir.Value:
    """Values whose output channels are that axis, and whose blocks lie along the other."""
    known = formats.get(weight.format)
    if known.rows is None or known.columns is None:
        scales = scales.reshape(() if known.rows is None else -1)
    stored = graph.stored(weight.name + SCALE, scales.to(TORCH_TYPES[graph.body_type]).contiguous())
    if known.columns is None:
        return graph.op("DequantizeLinear", values, stored, axis=channels)
    return graph.op("DequantizeLinear", values, stored, axis=1 - channels, block_size=known.columns)
