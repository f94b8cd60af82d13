"""States that are rounded every so many tokens: when they are, and the inputs of the tokens in between (`model/carrying.py`)."""

from typing import NamedTuple

import onnx_ir as ir
import torch

from exporters.graph.builder import FLOAT, Graph

Value = ir.Value

LARGEST = torch.finfo(torch.float16).max


class Read(NamedTuple):
    """Real tokens of each row, int64 [B, 1]: of the whole sequence, and of this call (None: one)."""

    in_all: Value
    now: Value | None


def due(graph: Graph, read: Read, every: int) -> Value:
    """bool [B, 1]: whether a row read several tokens, or one and now a multiple of `every`."""
    at_end = graph.op("Equal", graph.op("Mod", read.in_all, graph.constant(every)), graph.constant(0))
    if read.now is None:
        return at_end
    alone = graph.op("And", graph.op("Equal", read.now, graph.constant(1)), at_end)
    return graph.op("Or", graph.op("Greater", read.now, graph.constant(1)), alone)


def slot(graph: Graph, read: Read, every: int) -> Value:
    """bool [B, every - 1]: the place of the row's last token, where it read one in this call."""
    place = graph.op("Mod", graph.op("Sub", read.in_all, graph.constant(1)), graph.constant(every))
    here = graph.op("Equal", place, graph.constant([range(every - 1)]))
    return here if read.now is None else graph.op("And", here, graph.op("Greater", read.now, graph.constant(0)))


def chosen(graph: Graph, rows: Value, where: Value, otherwise: Value, rank: int) -> Value:
    """float32 values of `rank` dimensions by a condition on the first two. (Not every runtime has a Where of narrower ones.)"""
    condition = rows if rank == 2 else graph.op("Unsqueeze", rows, graph.constant(range(2, rank)))
    return graph.op("Where", condition, where, otherwise)


def inputs_kept(graph: Graph, value: Value, kept: Value, is_due: Value, here: Value) -> Value:
    """value float32 [B, 1, width] in its slot of kept float16 [B, every - 1, width]; zeros where the state was rounded."""
    inside = graph.op("Clip", value, graph.constant(-LARGEST, FLOAT), graph.constant(LARGEST, FLOAT))
    with_new = chosen(graph, here, inside, graph.cast(kept, ir.DataType.FLOAT, ir.DataType.FLOAT16), 3)
    return graph.op("Cast", chosen(graph, is_due, graph.constant(0, FLOAT), with_new, 3), to=ir.DataType.FLOAT16)


def last_token(graph: Graph, read: Value, in_all: Value, keep: Value) -> Value:
    """float32 [B, 1, S]: 1 at the last token of each row, and 0 elsewhere. `read` [B, S] and `in_all` [B, 1] count real tokens,
    `keep` [B, S, 1] is 1 for those."""
    up_to_last = graph.op("Cast", graph.op("Equal", read, in_all), to=ir.DataType.FLOAT)
    row = graph.op("Transpose", graph.float32(keep), perm=[0, 2, 1])
    return graph.op("Mul", graph.op("Unsqueeze", up_to_last, graph.constant([1])), row)
