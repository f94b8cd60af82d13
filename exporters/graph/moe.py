"""Sparse mixture of experts in standard operators."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from compress.model.routing import GROUP_SCORES, SMALLEST_SUM, Router
from exporters.graph.builder import FLOAT, Graph


class Choice(NamedTuple):
    """The experts of every token, [tokens, top-k] each."""

    gates: ir.Value
    numbers: ir.Value


def mixture(
    graph: Graph,
    rows: ir.Value,
    choice: Choice,
    top_k: int,
    experts: int,
    width: int,
    run: Callable[[int, ir.Value], ir.Value],
) -> ir.Value:
    """What each token's experts give, weighted by their gates: rows [tokens, K] -> [tokens, 1, K], K being `width`.

    The rows are sorted by expert and split: every expert runs on exactly the rows routed to it, most of them, in a
    decode step, on none, which costs nothing. Against an `If` per expert this is as fast and takes 0.8 of the memory
    (weights inside a branch are held twice); against running every expert, three times as fast at decode
    (benchmarks/RESULTS.md).
    """
    chosen = graph.reshape(choice.numbers, -1)
    order, counts = _sorted_by_expert(graph, chosen, experts)
    token = graph.op("Div", order, graph.constant(top_k))
    parts = graph.several(experts, "Split", graph.op("Gather", rows, token, axis=0), counts, axis=0)
    results = graph.op("Concat", *(run(e, part) for e, part in enumerate(parts)), axis=0)
    by_choice = graph.reshape(graph.op("Gather", results, _inverse(graph, order, chosen), axis=0), -1, top_k, width)
    return graph.op("MatMul", graph.op("Unsqueeze", choice.gates, graph.constant([1])), by_choice)


def choose(graph: Graph, logits: ir.Value, router: Router, experts: int, bias: ir.Value | None) -> Choice:
    """logits [tokens, R] and bias [E], float32, as `Router.gates` has it: of equal ranks TopK takes the lower number.

    The experts' rows come first. Rows after them, of experts that were removed, count in a softmax's denominator only.
    """
    is_softmax = router.score == "softmax"
    scores = graph.op("Softmax", logits, axis=-1) if is_softmax else graph.op("Sigmoid", logits)
    ranks = _ranks(graph, logits if router.chooses_by_logits else scores, router, experts, bias)
    _, numbers = graph.several(2, "TopK", ranks, graph.constant([router.top_k]), axis=-1)
    return Choice(_gates(graph, graph.op("GatherElements", scores, numbers, axis=-1), router), numbers)


def _ranks(graph: Graph, ranks: ir.Value, router: Router, experts: int, bias: ir.Value | None) -> ir.Value:
    """What experts are chosen by, from logits or scores [tokens, R]: [tokens, E], minus infinity outside the groups whose best
    experts sum highest."""
    if router.rows != experts:
        ranks = graph.op("Slice", ranks, graph.constant([0]), graph.constant([experts]), graph.constant([1]))
    if bias is not None:
        ranks = graph.op("Add", ranks, bias)
    if router.groups_used == router.groups:
        return ranks
    grouped = graph.reshape(ranks, -1, router.groups, experts // router.groups)
    used = graph.op("Where", _used_groups(graph, grouped, router), grouped, graph.constant(-np.inf, FLOAT))
    return graph.reshape(used, -1, experts)


def _used_groups(graph: Graph, grouped: ir.Value, router: Router) -> ir.Value:
    """[tokens, groups, experts of each] -> whether a group is chosen from, [tokens, groups, 1]."""
    best, _ = graph.several(2, "TopK", grouped, graph.constant([GROUP_SCORES]), axis=-1)
    sums = graph.op("ReduceSum", best, graph.constant([-1]), keepdims=0)
    _, used = graph.several(2, "TopK", sums, graph.constant([router.groups_used]), axis=-1)
    numbers = graph.constant(np.arange(router.groups).reshape(-1, 1))
    hits = graph.op("Equal", graph.op("Unsqueeze", used, graph.constant([1])), numbers)  # [tokens, groups, used]
    counts = graph.op("ReduceSum", graph.op("Cast", hits, to=ir.DataType.INT64), graph.constant([-1]), keepdims=1)
    return graph.op("Cast", counts, to=ir.DataType.BOOL)


def _gates(graph: Graph, gates: ir.Value, router: Router) -> ir.Value:
    """Scores of the chosen [tokens, top-k] -> their gates."""
    if router.renormalized:
        total = graph.op("ReduceSum", gates, graph.constant([-1]), keepdims=1)
        gates = graph.op("Div", gates, graph.op("Add", total, graph.constant(SMALLEST_SUM, FLOAT)))
    return gates if router.scale == 1 else graph.op("Mul", gates, graph.constant(router.scale, FLOAT))


def _sorted_by_expert(graph: Graph, chosen: ir.Value, experts: int) -> tuple[ir.Value, ir.Value]:
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
