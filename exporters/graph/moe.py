"""Sparse mixture of experts in standard operators."""

import numpy as np
import onnx_ir as ir

from compress.model.weight import Weight
from exporters.graph.blocks import swiglu
from exporters.graph.builder import Graph

Expert = tuple[Weight, Weight, Weight]  # gate, up, down


def moe(graph: Graph, x: ir.Value, router: ir.Value, router_rows: int, experts: list[Expert], top_k: int) -> ir.Value:
    """Each token's top-k experts, weighted by their gates. x [B, S, H], router [H, R], E experts -> [B, S, H].

    The rows are sorted by expert and split: every expert runs on exactly the rows routed to it, most of them, in a
    decode step, on none, which costs nothing. Against an `If` per expert this is as fast and takes 0.8 of the memory
    (weights inside a branch are held twice); against running every expert, three times as fast at decode
    (benchmarks/RESULTS.md).
    """
    hidden = experts[0][0].shape[1]
    rows = graph.reshape(x, -1, hidden)
    gates, chosen = _choose(graph, graph.op("MatMul", rows, router), router_rows, len(experts), top_k)
    chosen = graph.reshape(chosen, -1)
    order, counts = _sorted_by_expert(graph, chosen, len(experts))
    token = graph.op("Div", order, graph.constant(top_k))
    parts = graph.op("Split", graph.op("Gather", rows, token, axis=0), counts, outputs=len(experts), axis=0)
    results = graph.op(
        "Concat", *(swiglu(graph, part, *expert) for part, expert in zip(parts, experts, strict=True)), axis=0
    )
    by_choice = graph.reshape(graph.op("Gather", results, _inverse(graph, order, chosen), axis=0), -1, top_k, hidden)
    weighted = graph.op("MatMul", graph.op("Unsqueeze", gates, graph.constant([1])), by_choice)  # [tokens, 1, H]
    return graph.op("Reshape", weighted, graph.op("Shape", x))


def _choose(graph: Graph, logits: ir.Value, router_rows: int, experts: int, top_k: int):
    """logits [tokens, R] -> gates and numbers of the experts chosen, [tokens, top_k] each.

    Chosen by logits, as `layers.choose_experts` does: of equal ones TopK takes the lower number. The gates are a softmax
    over all rows of the router, not renormalised over fewer. The experts' rows come first. Rows after them, of experts
    that were removed, count in the denominator only.
    """
    probabilities = graph.op("Softmax", logits, axis=-1)
    if router_rows != experts:
        logits = graph.op("Slice", logits, graph.constant([0]), graph.constant([experts]), graph.constant([1]))
    _, chosen = graph.op("TopK", logits, graph.constant([top_k]), outputs=2, axis=-1)
    return graph.op("GatherElements", probabilities, chosen, axis=-1), chosen


def _sorted_by_expert(graph: Graph, chosen: ir.Value, experts: int):
    """chosen [n], place t * top_k + j holding the j-th choice of token t -> the places in order of expert, [n], and how
    many each expert has, [E]."""
    numbers = graph.constant(np.arange(experts).reshape(-1, 1))
    hits = graph.op("Equal", graph.op("Unsqueeze", chosen, graph.constant([0])), numbers)  # [E, n]
    counts = graph.op("ReduceSum", graph.op("Cast", hits, to=ir.DataType.INT64), graph.constant([1]), keepdims=0)
    return graph.op("Gather", graph.op("NonZero", hits), graph.constant(1), axis=0), counts


def _inverse(graph: Graph, order: ir.Value, like: ir.Value) -> ir.Value:
    """The permutation that undoes `order` [n]; `like` has its length in the graph's own dimensions, where NonZero made it
    another one, and no value of it is left."""
    count = graph.op("Squeeze", graph.shape_of(order, 0))
    places = graph.op("Range", graph.constant(0), count, graph.constant(1))
    return graph.op("ScatterElements", like, order, places, axis=0)
