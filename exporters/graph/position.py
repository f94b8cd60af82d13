"""How many real tokens a sequence has read: what rotary positions and the dither of stored states follow."""

import onnx_ir as ir

from exporters.graph.builder import Graph


def read(graph: Graph, given: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """int64 [B, S]: real tokens up to each new one, itself included. `given` has the new tokens, [B, S] or [B, S, H]."""

    def count() -> ir.Value:
        counted = graph.op("CumSum", attention_mask, graph.constant(1))
        length, total = graph.shape_of(given, 1), graph.shape_of(attention_mask, 1)
        return graph.op("Slice", counted, graph.op("Sub", total, length), total, graph.constant([1]))

    return graph.once("tokens read", count)


def read_now(graph: Graph, given: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """int64 [B, 1]: real ones among the new tokens."""

    def count() -> ir.Value:
        length, total = graph.shape_of(given, 1), graph.shape_of(attention_mask, 1)
        new = graph.op("Slice", attention_mask, graph.op("Sub", total, length), total, graph.constant([1]))
        return graph.op("ReduceSum", new, graph.constant([1]), keepdims=1)

    return graph.once("tokens read now", count)


def read_in_all(graph: Graph, attention_mask: ir.Value) -> ir.Value:
    """int64 [B, 1]."""
    return graph.once("all tokens read", lambda: graph.op("ReduceSum", attention_mask, graph.constant([1]), keepdims=1))
