"""The Hadamard rotation of the input of a matrix that is stored rotated (`compress/quantization/hadamard.py`).

A block of n = a b is rotated as a matrix X [a, b]: Sylvester's H_n is the Kronecker product of H_a and H_b, so that
H_n x = H_a X H_b. For n = 8192 that is two products with matrices of 64 and 128 rows in place of one of 8192.
Both are written with the small matrix on the right, H_a X as (X' H_a)': onnxruntime before 1.32 refuses H_a on the left of
no rows at all, which is what an expert that no token chose has, and, for the same reason, a transposition that it can make
part of the product: that is why b comes first in between.
"""

import onnx_ir as ir

from exporters.graph.builder import Graph


def rotated(graph: Graph, x: ir.Value, block: int | None) -> ir.Value:
    """x [..., K] -> R x, in blocks of `block`; x itself where that is None."""
    if block is None:
        return x
    return graph.once(("rotated", x, block), lambda: _rotate(graph, x, block))


def _rotate(graph: Graph, x: ir.Value, block: int) -> ir.Value:
    a = 1 << (block.bit_length() - 1) // 2
    b = block // a
    rows = graph.op("MatMul", graph.reshape(x, -1, a, b), _hadamard(graph, b))
    columns = graph.op("MatMul", graph.op("Transpose", rows, perm=[2, 0, 1]), _hadamard(graph, a))  # [b, blocks, a]
    return graph.op("Reshape", graph.op("Transpose", columns, perm=[1, 2, 0]), graph.op("Shape", x))


def _hadamard(graph: Graph, size: int) -> ir.Value:
    """H / sqrt(size) [size, size], doubled from one number in the graph: onnxruntime does it when it loads."""

    def double() -> ir.Value:
        h, signs = graph.number([[size**-0.5]]), graph.number([[[[1], [1]]], [[[1], [-1]]]])
        for half in (1 << i for i in range(size.bit_length() - 1)):
            h = graph.reshape(graph.op("Mul", signs, graph.reshape(h, 1, half, 1, half)), 2 * half, 2 * half)
        return h

    return graph.once(("hadamard", size), double)
