"""Blocks in the portable dialect: standard operators of opset 21 only. Weights are added as they are loaded."""

import onnx_ir as ir

from compress.model.weight import Weight
from exporters.graph.builder import FLOAT, Graph
from exporters.graph.rounding import input_of, multiplies_whole_numbers, whole_number_product
from exporters.graph.stored import matrix, plain


def linear(graph: Graph, x: ir.Value, weight: Weight, bias: Weight | None = None) -> ir.Value:
    """x [..., K], rotated and rounded first where the weight says so, times the transpose of weight [N, K]."""
    if multiplies_whole_numbers(weight):
        y = whole_number_product(graph, x, weight)
    else:
        y = graph.op("MatMul", input_of(graph, x, weight), matrix(graph, weight))
    return y if bias is None else graph.op("Add", y, plain(graph, bias))


def rms_norm(graph: Graph, x: ir.Value, weight: Weight, eps: float) -> ir.Value:
    square = graph.op("Mul", x, x)
    mean = graph.op("ReduceMean", square, graph.constant([-1]), keepdims=1)
    root = graph.op("Sqrt", graph.op("Add", mean, graph.constant(eps, FLOAT)))
    return graph.op("Mul", graph.op("Div", x, root), plain(graph, weight))


def silu(graph: Graph, x: ir.Value) -> ir.Value:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def swiglu(graph: Graph, x: ir.Value, gate: Weight, up: Weight, down: Weight) -> ir.Value:
    return linear(graph, graph.op("Mul", silu(graph, linear(graph, x, gate)), linear(graph, x, up)), down)
