"""Attention with grouped key-value heads and no positional encoding, for prefill and decode in one graph."""

import numpy as np
import onnx_ir as ir

from exporters.graph.builder import Graph

BLOCKED = np.finfo(np.float32).min  # added to a score that must not be attended to; finite, so no row becomes NaN


def causal_bias(graph: Graph, input_ids: ir.Value, attention_mask: ir.Value, past_key: ir.Value) -> ir.Value:
    """[B, 1, 1, S, T] of 0 where a token may look and BLOCKED elsewhere. A padded token looks at itself.

    The mask's T is said to be the keys' past + S: tools that infer shapes take them for two dimensions.
    """
    past = graph.shape_of(past_key, 2)
    total = graph.op("Add", past, graph.shape_of(input_ids, 1))
    shape = graph.op("Concat", graph.shape_of(input_ids, 0), total, axis=0)
    attention_mask = graph.op("Reshape", attention_mask, shape)
    zero, one, total = graph.constant(0), graph.constant(1), graph.op("Squeeze", total)
    column = graph.op("Range", zero, total, one)
    row = graph.op("Unsqueeze", graph.op("Range", graph.op("Squeeze", past), total, one), graph.constant([1]))  # [S, 1]
    real = graph.op(
        "Cast", graph.op("Unsqueeze", attention_mask, graph.constant([1])), to=ir.DataType.BOOL
    )  # [B, 1, T]
    earlier, itself = graph.op("Less", column, row), graph.op("Equal", column, row)  # [S, T]
    allowed = graph.op("Or", graph.op("And", real, earlier), itself)  # [B, S, T]
    bias = graph.op("Where", allowed, graph.constant(0.0, np.float32), graph.constant(BLOCKED, np.float32))
    return graph.op("Unsqueeze", bias, graph.constant([1, 2]))


def attention(graph: Graph, query, key, value, past_key, past_value, bias, kv_heads: int, head_dim: int):
    """query [B, S, Q * P], key and value [B, S, G * P] -> mixed [B, S, Q * P], present key and value [B, G, T, P]."""
    query = graph.reshape(query, 0, 0, kv_heads, -1, head_dim)
    query = graph.op("Transpose", query, perm=[0, 2, 3, 1, 4])  # [B, G, Q/G, S, P]
    query = graph.op("Mul", query, graph.constant(head_dim**-0.5, np.float32))
    key = graph.op("Concat", past_key, _heads(graph, key, kv_heads, head_dim), axis=2)
    value = graph.op("Concat", past_value, _heads(graph, value, kv_heads, head_dim), axis=2)
    group = graph.constant([2])
    transposed = graph.op("Unsqueeze", graph.op("Transpose", key, perm=[0, 1, 3, 2]), group)  # [B, G, 1, P, T]
    scores = graph.op("Add", graph.op("MatMul", query, transposed), bias)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), graph.op("Unsqueeze", value, group))
    mixed = graph.op("Transpose", mixed, perm=[0, 3, 1, 2, 4])
    return graph.reshape(mixed, 0, 0, -1), key, value


def _heads(graph: Graph, x: ir.Value, kv_heads: int, head_dim: int) -> ir.Value:
    return graph.op("Transpose", graph.reshape(x, 0, 0, kv_heads, head_dim), perm=[0, 2, 1, 3])
