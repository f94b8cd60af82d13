"""Products with stored matrices."""

import onnx_ir as ir

from compress.model.weight import Weight
from exporters.graph.builder import Graph, with_width
from exporters.graph.rounding import input_of, multiplies_whole_numbers, whole_number_product
from exporters.graph.stored import matrix, plain


def linear(graph: Graph, x: ir.Value, weight: Weight, bias: Weight | None = None) -> ir.Value:
    """x [..., K], rotated and rounded first where the weight says so, times the transpose of weight [N, K]."""
    if multiplies_whole_numbers(weight):
        y = whole_number_product(graph, x, weight)
    else:
        y = graph.op("MatMul", input_of(graph, x, weight), matrix(graph, weight))
    return with_width(y if bias is None else graph.op("Add", y, plain(graph, bias)), weight.shape[0])
