"""Mamba-2's recurrence (Dao & Gu, "Transformers are SSMs", arXiv 2405.21060) for prefill and decode, chunk by chunk.

    h_t = exp(dt_t A) h_(t-1) + dt_t b_t x_t^T        y_t = c_t h_t + D x_t        for every head, h [N, P]

One decay a head lets the tokens of a chunk be computed together: what token j adds reaches token i as
exp(dt_(j+1) A + ... + dt_i A) (c_i . b_j) dt_j x_j, a product of small matrices like attention's, and only the state goes
from chunk to chunk, by a Scan. A prompt takes a third to a seventh of the time of a Scan over tokens, a decode step
about the same (benchmarks/RESULTS.md).

A sequence is cut into as few chunks as it takes, all of one length, so that hardly any padding is computed: 65 tokens
make two chunks of 33, a decode step one chunk of one.

B batch, K chunks, L tokens in each, G groups of heads that share b and c, R heads in each, P channels a head, N states.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from exporters.graph.builder import FLOAT, Dimension, Graph, declare, fixed_shape, like

CHUNK = 64  # tokens at most; 32 is as fast, 128 slower in a long prompt
LENGTH = 3  # the axis of L in a body's values, [B, G, R, L, ...]
END = (1 << 63) - 1  # "to the end" for Slice


class Sizes(NamedTuple):
    """G, R, P and N."""

    groups: int
    heads: int
    head_dim: int
    d_state: int


def ssd(
    graph: Graph,
    x: ir.Value,
    dt: ir.Value,
    a: Callable[[Graph], ir.Value],
    b: ir.Value,
    c: ir.Value,
    d: ir.Value,
    state: ir.Value,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    d_state: int,
) -> tuple[ir.Value, ir.Value]:
    """x [B, S, heads * P], dt (zero on padding) [B, S, heads], b and c [B, S, G * N], d [heads], state [B, heads, N, P] ->
    y [B, S, heads * P] and the state after the last token.

    `a` adds A, [heads], to the body of the Scan: OpenVINO refuses a body that takes more than stored weights from outside.
    All calls within one graph must be for sequences of one length: what follows from it is in the graph once.
    """
    shared = heads // groups
    chunks = Chunks(graph, x)
    shapes = ((groups, shared, head_dim), (groups, shared, 1), (groups, 1, d_state), (groups, 1, d_state))
    following, y = graph.several(
        2,
        "Scan",
        graph.reshape(state, 0, groups, shared, d_state, head_dim),
        *(chunks.cut(value, shape) for value, shape in zip((x, dt, b, c), shapes, strict=True)),
        chunks.earlier(),
        body=_chunk(graph.inner(), a, fixed_shape(state)[0], Sizes(groups, shared, head_dim, d_state)),
        num_scan_inputs=5,
        scan_input_axes=[1, 1, 1, 1, 0],
        scan_output_axes=[1],
    )
    y = chunks.joined(y, x, heads * head_dim)
    skipped = graph.op("Mul", x, by_channel(graph, d, heads, head_dim))
    return graph.op("Add", y, skipped), graph.reshape(following, 0, heads, d_state, head_dim)


def replayed(
    graph: Graph,
    earlier: ir.Value,
    a: ir.Value,
    state: ir.Value,
    *,
    heads: int,
    head_dim: int,
    groups: int,
    d_state: int,
) -> ir.Value:
    """The state after the tokens of `earlier` [B, T, heads * P + heads + G * N], their x, dt and b: as a chunk that nobody asks
    an output of. a [heads]."""
    shared, axis = heads // groups, graph.constant(1)
    x, dt, b = graph.several(3, "Split", earlier, graph.constant([heads * head_dim, heads, groups * d_state]), axis=2)
    until_end = graph.op("CumSum", dt, axis, exclusive=1, reverse=1)
    share = graph.op("Mul", graph.op("Exp", graph.op("Mul", until_end, a)), dt)
    x = graph.op("Mul", graph.reshape(x, 0, 0, groups, shared, head_dim), graph.reshape(share, 0, 0, groups, shared, 1))
    x = graph.op("Transpose", x, perm=[0, 2, 3, 1, 4])  # [B, G, R, T, P]
    b = graph.op("Transpose", graph.reshape(b, 0, 0, groups, 1, d_state), perm=[0, 2, 3, 4, 1])
    added = graph.reshape(graph.op("MatMul", b, x), 0, heads, d_state, head_dim)
    whole = graph.op("Mul", graph.op("ReduceSum", dt, graph.constant([1]), keepdims=1), a)
    kept = graph.op("Mul", graph.op("Exp", graph.reshape(whole, 0, heads, 1, 1)), state)
    return like(graph.op("Add", kept, added), state)


def by_channel(graph: Graph, d: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[heads] -> [heads * P]; of weights alone, hence computed once, when a session loads."""
    wide = graph.op("Expand", graph.reshape(d, heads, 1), graph.constant([heads, head_dim]))
    return graph.reshape(wide, heads * head_dim)


class Chunks:
    """Cuts sequences of one length; what is computed from the length alone is added to the graph once, for all layers."""

    def __init__(self, graph: Graph, sequence: ir.Value):
        self._graph, one, most = graph, graph.constant([1]), graph.constant([CHUNK])
        self._batch = self._once("batch", lambda: graph.shape_of(sequence, 0))
        self._length = self._once("length", lambda: graph.shape_of(sequence, 1))
        last = self._once("last", lambda: graph.op("Sub", self._length, one))
        self._count = self._once("count", lambda: graph.op("Add", graph.op("Div", last, most), one))
        self._size = self._once("size", lambda: graph.op("Add", graph.op("Div", last, self._count), one))

    def _once(self, name: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        return self._graph.once(("chunks", name), make)

    def cut(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """[B, S, prod(shape)] -> [B, K, L, *shape], with zeros in the end: they leave a state as it is, since dt is 0."""
        graph = self._graph
        padded = graph.op("Concat", value, self._once(("zeros", math.prod(shape)), lambda: self._zeros(shape)), axis=1)
        start, rest = graph.constant([0]), graph.constant([-1, *shape])
        return graph.op(
            "Reshape", padded, self._once(shape, lambda: graph.op("Concat", start, self._count, rest, axis=0))
        )

    def _zeros(self, shape: Sequence[int]) -> ir.Value:
        """[B, K * L - S, prod(shape)]."""
        graph = self._graph
        missing = graph.op("Sub", graph.op("Mul", self._count, self._size), self._length)
        width = graph.constant([math.prod(shape)])
        return graph.op("ConstantOfShape", graph.op("Concat", self._batch, missing, width, axis=0))

    def earlier(self) -> ir.Value:
        """[K, L, L]: 1 where the column's token comes before the row's, for every chunk."""
        return self._once("earlier", self._earlier)

    def _earlier(self) -> ir.Value:
        graph = self._graph
        shape = graph.op("Concat", self._count, self._size, self._size, axis=0)
        ones = graph.op("ConstantOfShape", shape, value=ir.tensor(np.ones(1, FLOAT)))
        return graph.op("Trilu", ones, graph.constant(-1), upper=0)

    def joined(self, y: ir.Value, like: ir.Value, width: int) -> ir.Value:
        """[B, K, L, width] -> [B, S, width], as `like`: symbolic_shape_infer takes the length of the Slice for K * L."""
        graph, whole = self._graph, self._graph.reshape(y, 0, -1, width)
        whole = graph.op("Slice", whole, graph.constant([0]), self._length, graph.constant([1]))
        return graph.op("Reshape", whole, self._once(("shape", width), lambda: graph.op("Shape", like)))


def _chunk(body: Graph, a: Callable[[Graph], ir.Value], batch: Dimension, sizes: Sizes) -> ir.Graph:
    """The body of the Scan: one chunk. Only numbers of at most 0 are exponentiated."""
    state, x, dt, b, c, earlier = inputs = _inputs(body, batch, sizes)
    x, dt, c = (body.op("Transpose", value, perm=[0, 2, 3, 1, 4]) for value in (x, dt, c))  # [B, G, R or 1, L, ...]
    b = body.op("Transpose", b, perm=[0, 2, 3, 4, 1])  # [B, G, 1, N, L]
    steps = body.op("Mul", dt, body.reshape(a(body), sizes.groups, sizes.heads, 1, 1))
    x = body.op("Mul", x, dt)

    since_start = body.op("Exp", _sums(body, steps))
    from_past = body.op("Mul", since_start, body.op("MatMul", c, state))
    y = body.op("Add", body.op("MatMul", _within(body, steps, b, c, earlier), x), from_past)

    until_end = body.op("Exp", _sums(body, steps, exclusive=1, reverse=1))
    last, end, axis = (body.constant([n]) for n in (-1, END, LENGTH))
    kept = body.op("Mul", body.op("Slice", since_start, last, end, axis), state)
    following = body.op("Add", kept, body.op("MatMul", b, body.op("Mul", until_end, x)))
    y = body.reshape(body.op("Transpose", y, perm=[0, 3, 1, 2, 4]), 0, 0, sizes.groups * sizes.heads * sizes.head_dim)
    return body.finish(inputs, [following, y], "ssd")


def _within(body: Graph, steps: ir.Value, b: ir.Value, c: ir.Value, earlier: ir.Value) -> ir.Value:
    """[B, G, R, L, L]: how much of token j reaches token i of the same chunk.

    What lies between is summed for every pair. As a difference of two sums from the chunk's start it would save
    a twentieth of the whole, and be wrong by 1e-5 where the decay is strong.
    """
    between = _sums(body, body.op("Mul", steps, earlier))
    products = body.op("Trilu", body.op("MatMul", c, b), upper=0)
    return body.op("Mul", products, body.op("Exp", between))


def _sums(body: Graph, value: ir.Value, **attributes: int) -> ir.Value:
    return body.op("CumSum", value, body.constant(LENGTH), **attributes)


def _inputs(body: Graph, batch: Dimension, sizes: Sizes) -> list[ir.Value]:
    """State, x, dt, b and c of one chunk, and which tokens come before which."""
    groups, heads, head_dim, d_state = sizes
    fed = [(heads, head_dim), (heads, 1), (1, d_state), (1, d_state)]
    shapes: list[list[Dimension]] = [[batch, *sizes[:2], d_state, head_dim]]
    shapes += [[batch, "chunk_length", groups, *shape] for shape in fed]
    shapes += [["chunk_length", "chunk_length"]]
    return [declare(body.unique_name("chunk"), ir.DataType.FLOAT, shape) for shape in shapes]
