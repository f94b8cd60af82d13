"""Blocks in the portable dialect: standard operators of opset 21 only. Weights are added as they are loaded."""

import numpy as np
import onnx_ir as ir

from compress.formats.base import Quantized
from compress.model import Weight
from exporters.graph.builder import Graph

FLOAT = np.float32
SCALE = "_scale"  # a quantized weight X has its scales beside it as X_scale
TIED = ".tied"


def linear(graph: Graph, x: ir.Value, weight: Weight, bias: Weight | None = None) -> ir.Value:
    """x [..., K] times the transpose of weight [N, K].

    The matrix is stored as [K, N]: only then does onnxruntime fuse DequantizeLinear and MatMul into MatMulNBits.
    """
    y = graph.op("MatMul", x, matrix(graph, weight))
    return y if bias is None else graph.op("Add", y, plain(graph, bias))


def matrix(graph: Graph, weight: Weight) -> ir.Value:
    """weight [N, K] as a float32 value [K, N]: int8 with one scale per column, or float32 as it is."""
    if not weight.is_quantized:
        return plain(graph, weight, lambda tensor: tensor.T)
    values, scales = load_quantized(weight)
    stored = graph.weight(weight.name, values.T)
    return graph.op("DequantizeLinear", stored, graph.weight(scale_name(weight), scales), axis=1)


def load_quantized(weight: Weight) -> tuple[np.ndarray, np.ndarray]:
    """int8 values [N, K] and float32 scales [N], read in blocks of rows so that nothing else is in memory."""
    values, scales = np.empty(weight.shape, np.int8), np.empty(weight.shape[0], FLOAT)
    for rows in weight.row_blocks():
        block: Quantized = weight.load(rows)
        values[rows], scales[rows] = block.values.numpy(), block.scales[:, 0].numpy()
    return values, scales


def scale_name(weight: Weight) -> str:
    return weight.name + SCALE


def plain(graph: Graph, weight: Weight, transform=lambda tensor: tensor, name: str | None = None) -> ir.Value:
    """A weight as float32, transformed (such as transposed) before it is stored, under another name where it is not it."""
    return graph.weight(name or weight.name, transform(weight.dense()).numpy())


def rms_norm(graph: Graph, x: ir.Value, weight: Weight, eps: float) -> ir.Value:
    square = graph.op("Mul", x, x)
    mean = graph.op("ReduceMean", square, graph.constant([-1]), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(eps, FLOAT)))
    return graph.op("Mul", graph.op("Div", x, root), plain(graph, weight))


def silu(graph: Graph, x: ir.Value) -> ir.Value:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def swiglu(graph: Graph, x: ir.Value, gate: Weight, up: Weight, down: Weight) -> ir.Value:
    return linear(graph, graph.op("Mul", silu(graph, linear(graph, x, gate)), linear(graph, x, up)), down)


class Table:
    """The embedding [V, H], which a tied head shares: the matrix is stored once."""

    def __init__(self, graph: Graph, weight: Weight):
        self._name, self._hidden = weight.name, weight.shape[1]
        self._values, self._scales = None, None
        if weight.is_quantized:
            values, self._scales = load_quantized(weight)
            self._values = graph.weight(weight.name, values)
        else:
            self._values = plain(graph, weight)

    def lookup(self, graph: Graph, ids: ir.Value) -> ir.Value:
        """ids [B, S] -> [B, S, H]. Rows are gathered as stored and widened after: the table is never dequantized whole."""
        flat = graph.reshape(ids, -1)
        rows = graph.op("Gather", self._values, flat, axis=0)
        if self._scales is not None:
            scales = graph.op("Gather", graph.weight(self._name + SCALE, self._scales), flat, axis=0)
            rows = graph.op("DequantizeLinear", rows, scales, axis=0)
        shape = graph.op("Concat", graph.op("Shape", ids), graph.constant([self._hidden]), axis=0)
        return graph.op("Reshape", rows, shape)

    def project(self, graph: Graph, x: ir.Value) -> ir.Value:
        """The tied head: x [B, S, H] -> logits [B, S, V].

        The transpose is folded when a session loads. The scales are stored a second time under another name: where an
        initializer has two users, onnxruntime does not fuse DequantizeLinear and MatMul.
        """
        matrix = graph.op("Transpose", self._values, perm=[1, 0])
        if self._scales is not None:
            scales = graph.weight(f"{self._name}{TIED}{SCALE}", self._scales)
            matrix = graph.op("DequantizeLinear", matrix, scales, axis=1)
        return graph.op("MatMul", x, matrix)
