"""Mixture of experts without data-dependent shapes.

Dense: every expert on every token, weighted by gates that are mostly zero. What an expert that was not chosen gives is left out,
not multiplied with zero: beyond the range of fp16 it is infinite.

Gathered: of each token, the matrices of the experts it goes to.
"""

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


def separate(
    graph: Graph, rows: ir.Value, gates: ir.Value, experts: int, run: Callable[[int, ir.Value], ir.Value]
) -> ir.Value:
    """rows [tokens, K], gates [tokens, E] -> [tokens, K]."""
    total: ir.Value | None = None
    for number, gate in enumerate(graph.several(experts, "Split", gates, axis=1, num_outputs=experts)):
        given = _weighted(graph, run(number, rows), gate)
        total = given if total is None else graph.op("Add", total, given)
    assert total is not None  # a mixture has an expert
    return total


def together(graph: Graph, rows: ir.Value, gates: ir.Value, run: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """The same where all experts run at once: `run` makes [E, tokens, K] of [1, tokens, K]."""
    by_expert = graph.op("Unsqueeze", graph.op("Transpose", gates, perm=[1, 0]), graph.constant([2]))
    given = _weighted(graph, run(graph.op("Unsqueeze", rows, graph.constant([0]))), by_expert)
    return graph.op("ReduceSum", given, graph.constant([0]), keepdims=0)


def _weighted(graph: Graph, given: ir.Value, gates: ir.Value) -> ir.Value:
    """given [..., K] times gates [..., 1], zero where a gate is."""
    chosen = graph.op("Greater", gates, graph.constant(0, FLOAT))
    return graph.op("Where", chosen, graph.op("Mul", given, graph.from_float32(gates)), graph.number(0.0))
