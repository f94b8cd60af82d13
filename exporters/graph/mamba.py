"""Mamba-1 for prefill and decode: causal convolution with its state, and the selective scan as an ONNX Scan."""

from typing import NamedTuple

import onnx_ir as ir

from exporters.graph import position
from exporters.graph.builder import Dimension, Graph, declare, fixed_shape, like, sizes_of
from exporters.graph.stored import widened

END = (1 << 63) - 1  # "to the end" for Slice


class TokenMask(NamedTuple):
    """`keep` [B, S, 1] is 1 for the new tokens and 0 for padding among them; `real` [B, 1] how many places the last token is
    from the first place: S, unless padding follows it."""

    keep: ir.Value
    real: ir.Value


def token_mask(graph: Graph, given: ir.Value, attention_mask: ir.Value) -> TokenMask:
    """`given` has the new tokens, [B, S] or [B, S, H]."""
    new, length = position.of_new(graph, given, attention_mask), graph.shape_of(given, 1)
    place = graph.op(
        "Range", graph.constant(1), graph.op("Squeeze", graph.op("Add", length, graph.constant([1]))), graph.constant(1)
    )
    real = graph.largest(graph.op("Mul", new, place))
    return TokenMask(graph.op("Unsqueeze", graph.op("Cast", new, to=graph.body_type), graph.constant([2])), real)


def causal_conv(
    graph: Graph,
    x: ir.Value,
    conv_state: ir.Value,
    real: ir.Value | None,
    weight: ir.Value,
    bias: ir.Value | None,
    width: int,
) -> tuple[ir.Value, ir.Value]:
    """x [B, S, D], conv_state [B, D, W - 1], real [B, 1], weight [W, D] -> y [B, S, D] and the state after the last token,
    which is at the last place where `real` is None.

    Written tap by tap: as an ONNX Conv over [B, D, S] a decode step takes four times as long (benchmarks/RESULTS.md).
    """
    past = graph.op("Transpose", conv_state, perm=[0, 2, 1])
    padded = graph.op("Concat", past, x, axis=1)  # [B, W - 1 + S, D]
    taps = graph.several(width, "Split", weight, axis=0, num_outputs=width)
    y = bias
    for k, tap in enumerate(taps):
        end = k - width + 1 or END
        shifted = graph.op("Slice", padded, graph.constant([k]), graph.constant([end]), graph.constant([1]))
        term = graph.op("Mul", shifted, tap)
        y = term if y is None else graph.op("Add", y, term)
    assert y is not None  # a convolution has a tap
    return y, graph.op("Transpose", _newest(graph, padded, real, width - 1), perm=[0, 2, 1])


def _newest(graph: Graph, padded: ir.Value, real: ir.Value | None, kept: int) -> ir.Value:
    """The inputs [B, kept, D] up to the last token of padded [B, kept + S, D]."""
    if real is None:
        return graph.op("Slice", padded, graph.constant([-kept]), graph.constant([END]), graph.constant([1]))
    newest = graph.op("Add", real, graph.constant(range(kept)))  # [B, kept]
    return graph.op("GatherND", padded, graph.op("Unsqueeze", newest, graph.constant([2])), batch_dims=1)


def selective_scan(
    graph: Graph, x: ir.Value, dt: ir.Value, a_log: ir.Value, b: ir.Value, c: ir.Value, state: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """h = exp(dt A) h + dt x b;  y = c . h   over time, A = -exp(A_log). x, dt [B, S, D]; b, c [B, S, N]; state [B, N, D],
    all float32; A_log [N, D] as it is stored.

    The state is laid out [N, D]: on CPU two to three times as fast as [D, N], since D is the long dimension. A is
    computed in the body of the Scan: OpenVINO refuses a body that takes more than stored weights from outside, and one
    that hands it on as a state copies it at every step.
    """
    row, column = graph.constant([2]), graph.constant([3])
    fed = [
        graph.op("Unsqueeze", t, axis) for t, axis in ((dt, row), (graph.op("Mul", dt, x), row), (b, column), (c, row))
    ]
    following, y = graph.several(
        2,
        "Scan",
        state,
        *fed,
        body=_body(graph.inner(), a_log, fixed_shape(state)),
        num_scan_inputs=4,
        scan_input_axes=[1] * 4,
        scan_output_axes=[1],
    )  # y [B, S, 1, D]
    return graph.op("Squeeze", y, row), following


def scan_step(
    graph: Graph, x: ir.Value, dt: ir.Value, a_log: ir.Value, b: ir.Value, c: ir.Value, state: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """`selective_scan` of one token, S = 1, without a loop."""
    b = graph.op("Transpose", b, perm=[0, 2, 1])  # [B, N, 1]
    return _advanced(graph, a_log, state, dt, graph.op("Mul", dt, x), b, c)


def replayed(graph: Graph, earlier: ir.Value, a_log: ir.Value, state: ir.Value) -> ir.Value:
    """The state [B, N, D] after the tokens of `earlier` [B, tokens, 2 D + N], their x, dt and b: what is left of each at their
    end, summed. They are few, and this needs no loop."""
    _, n, d = sizes_of(state)
    x, dt, b = graph.several(3, "Split", earlier, graph.constant([d, d, n]), axis=2)
    axis, a = graph.constant(1), decay(graph, a_log)
    until_end = graph.op("CumSum", dt, axis, exclusive=1, reverse=1)
    fed = graph.op("Unsqueeze", graph.op("Mul", dt, x), graph.constant([2]))
    fed = graph.op("Mul", graph.op("Unsqueeze", b, graph.constant([3])), fed)  # [B, tokens, N, D]
    left = graph.op("Exp", graph.op("Mul", graph.op("Unsqueeze", until_end, graph.constant([2])), a))
    added = graph.op("ReduceSum", graph.op("Mul", left, fed), graph.constant([1]), keepdims=0)
    whole = graph.op("ReduceSum", dt, graph.constant([1]), keepdims=1)
    kept = graph.op("Mul", graph.op("Exp", graph.op("Mul", whole, a)), state)
    return like(graph.op("Add", kept, added), state)


def _body(step: Graph, a_log: ir.Value, state: tuple[Dimension, ...]) -> ir.Graph:
    """The body of the Scan: state, dt, dt x, b and c of one token, shaped to broadcast over [B, N, D]; c to multiply it."""
    batch, n, d = state
    shapes: list[list[Dimension]] = [[batch, n, d], [batch, 1, d], [batch, 1, d], [batch, n, 1], [batch, 1, n]]
    inputs = [declare(step.unique_name("step"), ir.DataType.FLOAT, shape) for shape in shapes]
    y, following = _advanced(step, a_log, *inputs)
    return step.finish(inputs, [following, y], "selective_scan")


def _advanced(
    graph: Graph, a_log: ir.Value, h: ir.Value, dt: ir.Value, dtx: ir.Value, b: ir.Value, c: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """One token: y [B, 1, D] and the state after it."""
    decayed = graph.op("Mul", graph.op("Exp", graph.op("Mul", dt, decay(graph, a_log))), h)
    following = graph.op("Add", decayed, graph.op("Mul", b, dtx))
    return graph.op("MatMul", c, following), following


def decay(graph: Graph, a_log: ir.Value) -> ir.Value:
    """A = -exp(A_log), float32."""
    return graph.op("Neg", graph.op("Exp", widened(graph, a_log, to=ir.DataType.FLOAT)))
