"""Mixture of experts without data-dependent shapes: every expert on every token, weighted by gates that are mostly zero."""

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
    graph: Graph, rows: ir.Value, gates: ir.Value, experts: int, run: Callable[[int, ir.Value], ir.Value]
) -> ir.Value:
    """rows [tokens, K], gates [tokens, E] -> [tokens, K].

    What an expert that was not chosen gives is left out, not multiplied with zero: beyond the range of fp16 it is infinite."""
    zero = graph.number(0.0)
    total: ir.Value | None = None
    for number, gate in enumerate(graph.several(experts, "Split", gates, axis=1, num_outputs=experts)):
        chosen = graph.op("Greater", gate, graph.constant(0, FLOAT))
        given = graph.op("Where", chosen, graph.op("Mul", run(number, rows), graph.from_float32(gate)), zero)
        total = given if total is None else graph.op("Add", total, given)
    assert total is not None  # a mixture has an expert
    return total
