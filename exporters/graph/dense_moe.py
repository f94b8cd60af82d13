"""Mixture of experts without data-dependent shapes: every expert on every token, or matrices gathered by token."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from exporters.graph.builder import FLOAT, Graph
from exporters.graph.moe import Choice


def gates(graph: Graph, choice: Choice, experts: int) -> ir.Value:
    """Gates of the chosen [tokens, top-k] -> of all [tokens, E], float32, zero where an expert was not chosen."""
    shape = graph.op("Concat", graph.op("Shape", choice.numbers, end=1), graph.constant([experts]), axis=0)
    zeros = graph.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, FLOAT)))
    return graph.op("ScatterElements", zeros, choice.numbers, choice.gates, axis=1)


def mixture(
    graph: Graph, rows: ir.Value, gates: ir.Value, experts: int, run: Callable[[ir.Value], ir.Value]
) -> ir.Value:
    """rows [tokens, K], gates [tokens, E] -> [tokens, K]; `run` makes [E, tokens, K] of [1, tokens, K].

    What an expert that was not chosen gives is left out, not multiplied with zero: beyond the range of fp16 it is infinite."""
    gates = graph.op("Unsqueeze", graph.op("Transpose", gates, perm=[1, 0]), graph.constant([2]))
    given = run(graph.op("Unsqueeze", rows, graph.constant([0])))
    chosen = graph.op("Greater", gates, graph.constant(0, FLOAT))
    weighted = graph.op("Where", chosen, graph.op("Mul", given, graph.from_float32(gates)), graph.number(0.0))
    if experts == 1:
        return graph.op("Squeeze", weighted, graph.constant([0]))
    return graph.op("ReduceSum", weighted, graph.constant([0]), keepdims=0)


def gathered(
    graph: Graph, rows: ir.Value, choice: Choice, top_k: int, width: int, run: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """rows [tokens, K] -> [tokens, 1, K], K being `width`; `run` makes [n, 1, K] of numbers of experts [n] and rows [n, 1, K].

    Of a token's experts alone the matrices are read, each of them for every token that goes there."""
    repeated = graph.op("Expand", graph.op("Unsqueeze", rows, graph.constant([1])), graph.constant([1, top_k, 1]))
    given = run(graph.reshape(choice.numbers, -1), graph.reshape(repeated, -1, 1, width))
    gates = graph.op("Unsqueeze", graph.from_float32(choice.gates), graph.constant([1]))
    return graph.op("MatMul", gates, graph.reshape(given, -1, top_k, width))
