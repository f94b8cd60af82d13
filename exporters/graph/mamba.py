"""Mamba-1 for prefill and decode: causal convolution with its state, and the selective scan as an ONNX Scan."""

from collections.abc import Callable

import onnx_ir as ir

from exporters.graph.builder import Graph, declare

END = (1 << 63) - 1  # "to the end" for Slice


def token_mask(graph: Graph, ids: ir.Value, attention_mask: ir.Value):
    """[B, S, 1] of 1 for the new tokens and 0 for padding among them, and [B, 1] how many places the last token is from
    the first place: S, unless padding follows it."""
    length, total = graph.shape_of(ids, 1), graph.shape_of(attention_mask, 1)
    new = graph.op("Slice", attention_mask, graph.op("Sub", total, length), total, graph.constant([1]))
    place = graph.op(
        "Range", graph.constant(1), graph.op("Squeeze", graph.op("Add", length, graph.constant([1]))), graph.constant(1)
    )
    real = graph.row_max(graph.op("Mul", new, place))
    return graph.op("Unsqueeze", graph.op("Cast", new, to=ir.DataType.FLOAT), graph.constant([2])), real


def causal_conv(graph: Graph, x, conv_state, real, weight, bias: ir.Value | None, width: int):
    """x [B, S, D], conv_state [B, D, W - 1], real [B, 1], weight [W, D] -> y [B, S, D] and the state after the last token.

    Written tap by tap: as an ONNX Conv over [B, D, S] a decode step takes four times as long (benchmarks/RESULTS.md).
    """
    past = graph.op("Transpose", conv_state, perm=[0, 2, 1])
    padded = graph.op("Concat", past, x, axis=1)  # [B, W - 1 + S, D]
    taps = graph.op("Split", weight, outputs=width, axis=0, num_outputs=width)
    y = bias
    for k, tap in enumerate(taps):
        end = k - width + 1 or END
        shifted = graph.op("Slice", padded, graph.constant([k]), graph.constant([end]), graph.constant([1]))
        term = graph.op("Mul", shifted, tap)
        y = term if y is None else graph.op("Add", y, term)
    newest = graph.op("Add", real, graph.constant(range(width - 1)))  # [B, W - 1]
    state = graph.op("GatherND", padded, graph.op("Unsqueeze", newest, graph.constant([2])), batch_dims=1)
    return y, graph.op("Transpose", state, perm=[0, 2, 1])


def selective_scan(graph: Graph, x, dt, a: Callable[[Graph], ir.Value], b, c, recurrent_state, sizes: tuple[int, int]):
    """h = exp(dt a) h + dt x b;  y = c . h   over time. x, dt [B, S, D]; a [N, D]; b, c [B, S, N]; state [B, N, D].

    The state is laid out [N, D]: on CPU two to three times as fast as [D, N], since D is the long dimension. `a` is
    computed in the body of the Scan: OpenVINO refuses a body that takes more than stored weights from outside, and one
    that hands it on as a state copies it at every step. `sizes` are N and D.
    """
    row, column = graph.constant([2]), graph.constant([3])
    fed = [
        graph.op("Unsqueeze", t, axis) for t, axis in ((dt, row), (graph.op("Mul", dt, x), row), (b, column), (c, row))
    ]
    state, y = graph.op(
        "Scan",
        recurrent_state,
        *fed,
        outputs=2,
        body=_step(graph.body(), a, *sizes),
        num_scan_inputs=4,
        scan_input_axes=[1] * 4,
        scan_output_axes=[1],
    )  # y [B, S, 1, D]
    return graph.op("Squeeze", y, row), state


def _step(step: Graph, a: Callable[[Graph], ir.Value], state_size: int, channels: int) -> ir.Graph:
    """The body of the Scan: one token."""
    h, dt, dtx, b, c = inputs = _step_inputs(step, state_size, channels)
    decayed = step.op("Mul", step.op("Exp", step.op("Mul", dt, a(step))), h)
    following = step.op("Add", decayed, step.op("Mul", b, dtx))
    return step.finish(inputs, [following, step.op("MatMul", c, following)], "selective_scan")


def _step_inputs(step: Graph, state_size: int, channels: int) -> list[ir.Value]:
    """State, dt, dt x, b and c of one token, shaped to broadcast over [B, N, D]; c to multiply it."""
    shapes = ([state_size, channels], [1, channels], [1, channels], [state_size, 1], [1, state_size])
    return [declare(step.unique_name("step"), ir.DataType.FLOAT, ["batch_size", *shape]) for shape in shapes]
