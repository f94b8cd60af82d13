"""The Hadamard rotation of the input of a matrix that is stored rotated (`compress/quantization/hadamard.py`).

A block of n = a b is rotated as a matrix X [a, b]: Sylvester's H_n is the Kronecker product of H_a and H_b, so that
H_n x = H_a X H_b. For n = 8192 that is two products with matrices of 64 and 128 rows in place of one of 8192.
"""

import onnx_ir as ir

from exporters.graph.builder import FLOAT, Graph


def rotated(graph: Graph, x: ir.Value, width: int, block: int | None) -> ir.Value:
    """x [..., width] -> R x, in blocks of `block`; x itself where that is None."""
    if block is None:
        return x
    return graph.once(("rotated", x, block), lambda: _rotate(graph, x, width, block))


def _rotate(graph: Graph, x: ir.Value, width: int, block: int) -> ir.Value:
    a = 1 << (block.bit_length() - 1) // 2
    b = block // a
    blocks = graph.constant([width // block, a, b])
    shape = graph.op("Concat", graph.op("Shape", x, end=-1), blocks, axis=0)
    parts = graph.op("MatMul", graph.op("Reshape", x, shape), _hadamard(graph, b))
    parts = graph.op("MatMul", _hadamard(graph, a), parts)
    return graph.op("Reshape", parts, graph.op("Shape", x))


def _hadamard(graph: Graph, size: int) -> ir.Value:
    """H / sqrt(size), float32 [size, size], doubled from one number in the graph: onnxruntime does it when it loads."""

    def double() -> ir.Value:
        h, signs = graph.constant([[size**-0.5]], FLOAT), graph.constant([[[[1], [1]]], [[[1], [-1]]]], FLOAT)
        for half in (1 << i for i in range(size.bit_length() - 1)):
            h = graph.reshape(graph.op("Mul", signs, graph.reshape(h, 1, half, 1, half)), 2 * half, 2 * half)
        return h

    return graph.once(("hadamard", size), double)
