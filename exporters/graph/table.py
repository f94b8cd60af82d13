"""The embedding: rows looked up by token, and the same matrix once more as the output matrix where the head is tied.

Gather takes neither INT4 nor fp8, so int4 values lie two to a byte and fp8 ones as their bytes, both in uint8.
"""

import numpy as np
import onnx_ir as ir
import torch

from compress import formats
from compress.formats.base import NumberFormat
from compress.formats.integers import pair_nibbles
from compress.model.weight import Weight
from exporters.graph.builder import FP8, Graph, fixed_shape
from exporters.graph.rotation import rotated
from exporters.graph.rounding import input_of
from exporters.graph.stored import Scales, as_stored, dequantized, load, repeated, store_scales, widened

EVERY_BYTE = np.arange(256, dtype=np.uint8)


class Table:
    """A weight [V, H], stored once, row after row. Rows are gathered as stored and widened after: in a lookup the table
    is never dequantized whole."""

    def __init__(self, graph: Graph, weight: Weight):
        self._graph, self._weight = graph, weight
        self._quantized: tuple[NumberFormat, Scales] | None = None
        if not weight.is_quantized:
            self._values = as_stored(graph, weight)
            return
        quantized = load(weight)
        self._values = graph.weight(weight.name, weight.format, _bytes(quantized.values, self._kind))
        self._quantized = formats.get(weight.format), store_scales(graph, weight, quantized.scales)

    @property
    def _kind(self) -> str:
        """int4, int8, fp8, or bf16, fp16, fp32."""
        return self._weight.format.partition("-")[0]

    def lookup(self, ids: ir.Value) -> ir.Value:
        """ids [B, S] -> [B, S, H]."""
        width = self._weight.shape[1]
        rows = rotated(self._graph, self._dense(self._graph.reshape(ids, -1)), self._weight.rotation)  # back
        size = self._graph.constant([width])
        return self._graph.op("Reshape", rows, self._graph.op("Concat", self._graph.op("Shape", ids), size, axis=0))

    def project(self, x: ir.Value) -> ir.Value:
        """The tied head: x [B, S, H] -> logits [B, S, V]. All before the product is done when a session loads."""
        return self._graph.op("MatMul", input_of(self._graph, x, self._weight), self._matrix())

    def _matrix(self) -> ir.Value:
        """[H, V]."""
        graph = self._graph
        if self._quantized is None or self._kind == "fp8":
            return graph.op("Transpose", self._dense(None), perm=[1, 0])
        number_format, scales = self._quantized
        values = graph.op("Transpose", self._whole_numbers(self._values), perm=[1, 0])
        if self._kind == "int4":
            values = graph.op("Cast", values, to=ir.DataType.INT4)
        return dequantized(graph, values, _column_scales(graph, scales), number_format, self._weight.shape[0])

    def _dense(self, places: ir.Value | None) -> ir.Value:
        """The rows at `places` [n], or all, as [n, H] in the type of hidden states."""
        rows = self._values if places is None else self._graph.op("Gather", self._values, places, axis=0)
        if self._quantized is None:
            return widened(self._graph, rows, self._values)
        values = self._fp8_values(rows) if self._kind == "fp8" else self._cast_to_body(self._whole_numbers(rows))
        return self._graph.op("Mul", values, self._row_scales(places, *self._quantized))

    def _cast_to_body(self, values: ir.Value) -> ir.Value:
        return self._graph.op("Cast", values, to=self._graph.body_type)

    def _whole_numbers(self, rows: ir.Value) -> ir.Value:
        """int8 [n, H] of stored rows."""
        if self._kind == "int8":
            return rows
        graph, last = self._graph, self._graph.constant([2])
        low = graph.op("BitwiseAnd", rows, graph.constant(15, np.uint8))
        upper = graph.op("BitwiseAnd", rows, graph.constant(240, np.uint8))  # OpenVINO divides, and rounds what is left
        high = graph.op("BitShift", upper, graph.constant(4, np.uint8), direction="RIGHT")
        pairs = graph.op("Concat", *(graph.op("Unsqueeze", half, last) for half in (low, high)), axis=2)  # [n, H/2, 2]
        values = graph.op("Cast", graph.reshape(pairs, 0, self._weight.shape[1]), to=ir.DataType.INT8)
        return graph.op("Sub", values, graph.constant(8, np.int8))

    def _fp8_values(self, rows: ir.Value) -> ir.Value:
        """[n, H] of bytes: each looked up in a list of what every byte means."""
        meaning = self._cast_to_body(self._graph.constant(EVERY_BYTE.view(FP8), FP8))
        return self._graph.op("Gather", meaning, self._graph.op("Cast", rows, to=ir.DataType.INT32))

    def _row_scales(self, places: ir.Value | None, number_format: NumberFormat, scales: Scales) -> ir.Value:
        """What broadcasts over the rows at `places`, or over all: one number, [n, 1] or [n, H]."""
        graph, shape, step, width = self._graph, self._weight.shape, number_format.rows, number_format.columns
        if step is None:
            return scales.value(graph)
        if places is None:
            taken = scales.stored if step == 1 else repeated(graph, scales.stored, step, shape[0], axis=0)
        else:
            block = places if step == 1 else graph.op("Div", places, graph.constant(step))
            taken = graph.op("Gather", scales.stored, block, axis=0)
        taken = scales.widen(graph, taken)
        if width is None:
            return graph.op("Unsqueeze", taken, graph.constant([1]))
        return repeated(graph, taken, width, shape[1], axis=1)


def _column_scales(graph: Graph, scales: Scales) -> ir.Value:
    """The scales of the transposed matrix: computed, so that they have no user but this (see stored.py)."""
    rank = len(fixed_shape(scales.stored))
    if rank == 2:
        return scales.widen(graph, graph.op("Transpose", scales.stored, perm=[1, 0]))
    return scales.widen(graph, graph.op("Reshape", scales.stored, graph.constant([-1])) if rank else scales.stored)


def _bytes(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Values [V, H] in a type that Gather takes; int4 ones two to a byte, offset by 8, [V, H/2]."""
    if kind == "int4":
        return pair_nibbles((values + 8).to(torch.uint8))
    return values.view(torch.uint8) if kind == "fp8" else values
