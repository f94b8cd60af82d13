"""How many real tokens a sequence has read: what rotary positions and the dither of stored states follow."""

import onnx_ir as ir

from exporters.graph.builder import Graph


def of_new(graph: Graph, given: ir.Value, of_all: ir.Value) -> ir.Value:
    """The last S columns of [B, T].

    They are said to be as many as the new tokens: what TensorRT cuts from T columns may be T for all it knows, and then it
    sets memory aside for as many tokens in every layer."""
    batch, length, total = graph.shape_of(given, 0), graph.shape_of(given, 1), graph.shape_of(of_all, 1)
    last = graph.op("Slice", of_all, graph.op("Sub", total, length), total, graph.constant([1]))
    return graph.op("Reshape", last, graph.op("Concat", batch, length, axis=0))


def read(graph: Graph, given: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """int64 [B, S]: real tokens up to each new one, itself included. `given` has the new tokens, [B, S] or [B, S, H]."""

    def count() -> ir.Value:
        return of_new(graph, given, graph.op("CumSum", attention_mask, graph.constant(1)))

    return graph.once("tokens read", count)


def read_now(graph: Graph, given: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """int64 [B, 1]: real ones among the new tokens."""

    def count() -> ir.Value:
        return graph.op("ReduceSum", of_new(graph, given, attention_mask), graph.constant([1]), keepdims=1)

    return graph.once("tokens read now", count)


def read_in_all(graph: Graph, attention_mask: ir.Value) -> ir.Value:
    """int64 [B, 1]."""
    return graph.once("all tokens read", lambda: graph.op("ReduceSum", attention_mask, graph.constant([1]), keepdims=1))
