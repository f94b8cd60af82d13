"""Activations in eight bits, as `compress/quantization/activations.py` defines them, and products of whole numbers.

QuantizeLinear rounds to nearest with ties to even and saturates, to int8 and to fp8 alike.

Static int8 is QuantizeLinear and DequantizeLinear around inputs and weights alike, which onnxruntime makes one integer
product of. Both are stored as uint8 with zero point 128: as int8, onnxruntime 1.32 multiplies uint8 by int8, whose sums
saturate at 16 bits on processors without VNNI (a third of the value was lost in a test); uint8 by uint8 is exact on every
processor. (int8 by int8 through MatMulInteger is exact too, but on AVX2 forty times as slow: 1024 x 1024 by one token took
1.60 ms, uint8 x uint8 0.039, a float32 product 0.086.) Dynamic int8 has one scale per token, for which MatMulInteger is the
standard operator. All other rounded inputs are widened by Cast and Mul: a DequantizeLinear would stop the fusion of weights
into MatMulNBits, and beside one of fp8 weights onnxruntime before 1.32 makes an integer product of the two, which it then
refuses to load.
"""

import numpy as np
import onnx_ir as ir
import torch

from compress.formats.activations import Activation, largest
from compress.model.weight import Weight
from exporters.graph.builder import FLOAT, FP8, Graph
from exporters.graph.rotation import rotated
from exporters.graph.stored import load, store_scales, widened

OFFSET = 128  # of whole numbers stored as uint8
WHOLE = ("int8", "int8-tensor")  # weights whose products with int8 inputs are sums of whole numbers
TINY = float(np.finfo(FLOAT).tiny)


def multiplies_whole_numbers(weight: Weight) -> bool:
    return weight.activation is not None and not weight.activation.is_fp8 and weight.format in WHOLE


def input_of(graph: Graph, x: ir.Value, weight: Weight) -> ir.Value:
    """x [..., K] as the product with the stored matrix sees it: rotated where that is, and rounded."""
    x = rotated(graph, x, weight.rotation)
    if weight.activation is None:
        return x
    return _rounded(graph, x, weight.activation)


def _rounded(graph: Graph, x: ir.Value, activation: Activation) -> ir.Value:
    """In the type it had."""

    def widen() -> ir.Value:
        zero = graph.constant(0, FP8 if activation.is_fp8 else np.int8)
        values = _on_grid(graph, x, activation, zero)
        return graph.op("Mul", graph.op("Cast", values, to=graph.body_type), _scale(graph, x, activation))

    return graph.once(("rounded", x, *_key(activation)), widen)


def whole_number_product(graph: Graph, x: ir.Value, weight: Weight) -> ir.Value:
    """x [..., K], rounded to int8, times the transpose of an int8 weight [N, K], both as whole numbers."""
    assert weight.activation is not None, weight.name
    x = rotated(graph, x, weight.rotation)
    zero, quantized = graph.constant(OFFSET, np.uint8), load(weight)
    shifted = (quantized.values.T.to(torch.int16) + OFFSET).to(torch.uint8)
    values = graph.weight(weight.name, weight.format, shifted)
    scales = store_scales(graph, weight, quantized.scales).stored
    rounded = _on_grid(graph, x, weight.activation, zero)
    if weight.activation.is_static:
        scales = widened(graph, scales)
        return _dequantized_product(graph, rounded, _scale(graph, x, weight.activation), values, scales, zero)
    sums = graph.op("Cast", graph.op("MatMulInteger", rounded, values, zero, zero), to=ir.DataType.FLOAT)
    product = graph.op("Mul", sums, graph.float32(_scale(graph, x, weight.activation)))
    return graph.from_float32(graph.op("Mul", product, scales))


def _dequantized_product(
    graph: Graph, rounded: ir.Value, scale: ir.Value, values: ir.Value, scales: ir.Value, zero: ir.Value
) -> ir.Value:
    """QDQ: uint8 inputs with one scale, uint8 weights [K, N] with one scale, or one per column."""
    x = graph.once(("dequantized", rounded, scale), lambda: graph.op("DequantizeLinear", rounded, scale, zero))
    outputs = graph.op("Shape", values, start=1)
    scales, zeros = (graph.op("Expand", value, outputs) for value in (scales, zero))
    return graph.op("MatMul", x, graph.op("DequantizeLinear", values, scales, zeros, axis=1))


def _on_grid(graph: Graph, x: ir.Value, activation: Activation, zero: ir.Value) -> ir.Value:
    """round(x / scale) + zero, in the type of `zero`; made once for all matrices that share input and scale."""

    def quantize() -> ir.Value:
        scale = _scale(graph, x, activation)
        if activation.is_static:
            return graph.op("QuantizeLinear", x, scale, zero)
        return graph.op("QuantizeLinear", graph.op("Div", x, scale), graph.number(1.0), zero)

    return graph.once(("grid", x, zero, *_key(activation)), quantize)


def _key(activation: Activation) -> tuple[str, float | None]:
    return activation.format, _static_scale(activation) if activation.is_static else None


def _static_scale(activation: Activation) -> float:
    assert activation.scale is not None, activation.format
    return activation.scale()


def _scale(graph: Graph, x: ir.Value, activation: Activation) -> ir.Value:
    """One number, or [..., 1]."""
    if activation.is_static:
        return graph.number(_static_scale(activation))
    return graph.once(("token scale", x, activation.is_fp8), lambda: _token_scales(graph, x, activation.is_fp8))


def _token_scales(graph: Graph, x: ir.Value, is_fp8: bool) -> ir.Value:
    """max |x| / largest for every token, 1 for a token of zeros."""
    scales = graph.op("Div", graph.largest(graph.op("Abs", x)), graph.number(largest(is_fp8)))
    return graph.op("Where", graph.op("Greater", scales, graph.number(TINY)), scales, graph.number(1.0))
