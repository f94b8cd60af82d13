"""Norms, summed in float32 whatever the type of hidden states."""

import onnx_ir as ir

from compress.model.weight import Weight
from exporters.graph.builder import FLOAT, Graph
from exporters.graph.stored import plain


def rms_norm(graph: Graph, x: ir.Value, weight: Weight, eps: float, groups: int = 1) -> ir.Value:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, or of x [B, S, K] over `groups` equal parts of it."""
    x = graph.float32(x)
    if groups == 1:
        return graph.op("Mul", graph.from_float32(_divided(graph, x, eps)), plain(graph, weight))
    parts = _divided(graph, graph.reshape(x, 0, 0, groups, -1), eps)
    return graph.op("Mul", graph.from_float32(graph.reshape(parts, 0, 0, -1)), plain(graph, weight))


def _divided(graph: Graph, x: ir.Value, eps: float) -> ir.Value:
    """By the root of the mean square."""
    square = graph.op("Mul", x, x)
    mean = graph.op("ReduceMean", square, graph.constant([-1]), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(eps, FLOAT)))
    return graph.op("Div", x, root)
