"""Attention with grouped key-value heads, for prefill and decode in one graph, and rotary positions."""

from typing import NamedTuple

import onnx_ir as ir
import torch

from exporters.graph import position
from exporters.graph.builder import FLOAT, Graph, sizes_of


class Angles(NamedTuple):
    """Of rotary positions, [B, 1, S, P/2] each."""

    cosine: ir.Value
    sine: ir.Value


def causal_bias(graph: Graph, given: ir.Value, attention_mask: ir.Value, past_key: ir.Value) -> ir.Value:
    """[B, 1, 1, S, T] of 0 where a token may look and the lowest number elsewhere. A padded token looks at itself. `given` has
    the new tokens, [B, S] or [B, S, H].

    The mask's T is said to be the keys' past + S: tools that infer shapes take them for two dimensions.
    """
    past = graph.shape_of(past_key, 2)
    total = graph.op("Add", past, graph.shape_of(given, 1))
    shape = graph.op("Concat", graph.shape_of(given, 0), total, axis=0)
    attention_mask = graph.op("Reshape", attention_mask, shape)
    zero, one, total = graph.constant(0), graph.constant(1), graph.op("Squeeze", total)
    column = graph.op("Range", zero, total, one)
    new = graph.op("Range", zero, graph.op("Squeeze", graph.shape_of(given, 1)), one)
    row = graph.op("Add", graph.op("Unsqueeze", new, graph.constant([1])), past)  # [S, 1]
    real = graph.op(
        "Cast", graph.op("Unsqueeze", attention_mask, graph.constant([1])), to=ir.DataType.BOOL
    )  # [B, 1, T]
    earlier, itself = graph.op("Less", column, row), graph.op("Equal", column, row)  # [S, T]
    allowed = graph.op("Or", graph.op("And", real, earlier), itself)  # [B, S, T]
    return _bias(graph, allowed)


def past_bias(graph: Graph, attention_mask: ir.Value) -> ir.Value:
    """The same for one new token that is no padding: [B, 1, 1, 1, T]."""
    real = graph.op("Unsqueeze", attention_mask, graph.constant([1]))  # [B, 1, T]
    return _bias(graph, graph.op("Cast", real, to=ir.DataType.BOOL))


def _bias(graph: Graph, allowed: ir.Value) -> ir.Value:
    """allowed [B, S, T] -> [B, 1, 1, S, T]. The lowest number is finite, so that no row becomes NaN."""
    bias = graph.op("Where", allowed, graph.number(0.0), graph.number(graph.lowest))
    return graph.op("Unsqueeze", bias, graph.constant([1, 2]))


def attention(
    graph: Graph,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    past_key: ir.Value,
    past_value: ir.Value,
    bias: ir.Value,
    angles: Angles | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """query [B, S, Q * P], key and value [B, S, G * P], past [B, G, T - S, P] -> mixed [B, S, Q * P], key and value
    [B, G, T, P]."""
    _, kv_heads, _, head_dim = sizes_of(past_key)
    query = graph.reshape(query, 0, 0, kv_heads, -1, head_dim)
    query = _turned_query(graph, graph.op("Transpose", query, perm=[0, 2, 3, 1, 4]), angles)  # [B, G, Q/G, S, P]
    query = graph.op("Mul", query, graph.number(head_dim**-0.5))
    key = graph.op("Concat", past_key, _turned(graph, _heads(graph, key, kv_heads, head_dim), angles), axis=2)
    value = graph.op("Concat", past_value, _heads(graph, value, kv_heads, head_dim), axis=2)
    return _mixed(graph, query, key, value, bias), key, value


def _mixed(graph: Graph, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value) -> ir.Value:
    """query [B, G, Q/G, S, P], key and value [B, G, T, P] -> [B, S, Q * P]."""
    group = graph.constant([2])
    transposed = graph.op("Unsqueeze", graph.op("Transpose", key, perm=[0, 1, 3, 2]), group)  # [B, G, 1, P, T]
    scores = graph.op("Add", graph.op("MatMul", query, transposed), bias)
    mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), graph.op("Unsqueeze", value, group))
    return graph.reshape(graph.op("Transpose", mixed, perm=[0, 3, 1, 2, 4]), 0, 0, -1)


def _heads(graph: Graph, x: ir.Value, kv_heads: int, head_dim: int) -> ir.Value:
    return graph.op("Transpose", graph.reshape(x, 0, 0, kv_heads, head_dim), perm=[0, 2, 1, 3])


def rotary_angles(graph: Graph, given: ir.Value, attention_mask: ir.Value, base: float, head_dim: int) -> Angles:
    """Of the new tokens, counted in real ones: position * base^(-2i/P) (compress/arithmetic/attention.py)."""
    half = head_dim // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = graph.op("Mul", _positions(graph, given, attention_mask), graph.constant(frequencies.numpy(), FLOAT))
    cosine, sine = (graph.from_float32(graph.op(kind, angles)) for kind in ("Cos", "Sin"))
    return Angles(cosine, sine)


def _positions(graph: Graph, given: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """float32 [B, 1, S, 1]; 0 at padding in front."""
    place = graph.op("Sub", position.read(graph, given, attention_mask), graph.constant(1))
    place = graph.op("Max", place, graph.constant(0))
    return graph.op("Cast", graph.op("Unsqueeze", place, graph.constant([1, 3])), to=ir.DataType.FLOAT)


def _turned(graph: Graph, x: ir.Value, angles: Angles | None) -> ir.Value:
    """x [..., S, P], pairs (i, i + P/2) turned by their angles."""
    if angles is None:
        return x
    first, second = graph.several(2, "Split", x, axis=-1, num_outputs=2)
    turned = (
        graph.op("Sub", graph.op("Mul", first, angles.cosine), graph.op("Mul", second, angles.sine)),
        graph.op("Add", graph.op("Mul", second, angles.cosine), graph.op("Mul", first, angles.sine)),
    )
    return graph.op("Concat", *turned, axis=-1)


def _turned_query(graph: Graph, query: ir.Value, angles: Angles | None) -> ir.Value:
    """query [B, G, Q/G, S, P]."""
    if angles is None:
        return query
    axis = graph.constant([1])
    return _turned(graph, query, Angles(*(graph.op("Unsqueeze", part, axis) for part in angles)))
