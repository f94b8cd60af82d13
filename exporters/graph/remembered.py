"""What a model remembers in number formats, in a graph: as compress/formats/remembered.py has it, to the last bit.

Powers of two come from a table, since no runtime promises exact ones. Their exponents come from logarithms, which may be one
too low or too high beside a power of two: the scale that follows is the same.
"""

import math

import numpy as np
import onnx_ir as ir

from compress.formats.remembered import (
    FP8_POWER,
    LEAST_EXPONENT,
    MOST,
    NIBBLE,
    OFFSET,
    SLACK,
    STEPS,
    Format,
    Precision,
)
from compress.model.states import StateSpec
from exporters.graph.builder import DTYPES, FLOAT, Dimension, Graph
from exporters.graph.mamba import END
from exporters.graph.stored import repeated

Value = ir.Value


def restored_shape(spec: StateSpec, stored: tuple[Dimension, ...]) -> list[Dimension]:
    """Of a state as arithmetic takes it, batch and tokens as in the stored one."""
    return [stored[0], *(stored[1 + axis] if axis == spec.grows else size for axis, size in enumerate(spec.shape))]


def decoded(graph: Graph, spec: StateSpec, stored: Value, scales: Value | None) -> Value:
    """A state as stored -> float32 [B, ...]; `scales` are static ones."""
    precision, axis, size = spec.precision, spec.precision.axis, spec.shape[spec.precision.axis]
    entries = graph.op("Cast", stored, to=ir.DataType.FLOAT)
    if scales is None:
        blocks = precision.blocks(size)
        parts = graph.constant([precision.stored_size(size) - 2 * blocks, blocks, blocks])
        entries, first, second = graph.several(3, "Split", entries, parts, axis=axis)
        scales = _scale(graph, first, second, precision.format)
    if precision.format == "int4":
        entries = _unpacked(graph, entries, axis, size)
    return graph.op("Mul", entries, _for_entries(graph, scales, precision, size))


def kept_on(
    graph: Graph, spec: StateSpec, value: Value, kept: Value, dithers: Value | None, scales: Value | None
) -> Value:
    """A state after this call, float32 [B, ...], as it is stored; of one that grows, what was kept and the new entries."""
    if spec.grows is None:
        value = graph.reshape(value, 0, *spec.shape)  # which tools that infer shapes do not all know
        return _typed(graph, encoded(graph, spec, value, dithers, scales), spec.precision)
    new = encoded(graph, spec, new_of(graph, spec, value, kept), dithers, scales)
    axis = spec.grows + 1
    if spec.precision.format != "fp8-e4m3":
        return graph.op("Concat", kept, _typed(graph, new, spec.precision), axis=axis)
    past = graph.op("Cast", kept, to=ir.DataType.FLOAT)  # operators that move data take no fp8 before opset 24
    return _typed(graph, graph.op("Concat", past, new, axis=axis), spec.precision)


def new_of(graph: Graph, spec: StateSpec, value: Value, kept: Value) -> Value:
    """The entries of the new tokens."""
    assert spec.grows is not None, spec.name
    axis = spec.grows + 1
    return graph.op("Slice", value, graph.shape_of(kept, axis), graph.constant([END]), graph.constant([axis]))


def encoded(graph: Graph, spec: StateSpec, value: Value, dithers: Value | None, scales: Value | None) -> Value:
    """float32 [B, ...] -> what is stored, still as float32."""
    precision, axis, size = spec.precision, spec.precision.axis, spec.shape[spec.precision.axis]
    codes: tuple[Value, ...] = ()
    if scales is None:
        codes = _dynamic(graph, _largest(graph, value, spec), precision.format)
        scales = _scale(graph, *codes, precision.format)
    scaled = graph.op("Div", value, _for_entries(graph, scales, precision, size))
    whole = _on_grid(graph, scaled, precision.format, dithers)
    if precision.format == "int4":
        whole = _packed(graph, whole, axis, size)
    return graph.op("Concat", whole, *codes, axis=axis) if codes else whole


def _typed(graph: Graph, entries: Value, precision: Precision) -> Value:
    return graph.op("Cast", entries, to=DTYPES[precision.dtype])


# scales


def _for_entries(graph: Graph, scales: Value, precision: Precision, size: int) -> Value:
    """One scale for every block along the axis -> one for every entry, or a single one."""
    blocks = precision.blocks(size)
    if blocks == 1 or precision.block in (None, 1):
        return scales
    assert precision.block is not None
    return repeated(graph, scales, precision.block, size, axis=precision.axis)


def _largest(graph: Graph, value: Value, spec: StateSpec) -> Value:
    """max |x| of every block."""
    precision, axis, size = spec.precision, spec.precision.axis, spec.shape[spec.precision.axis]
    value, block, blocks = graph.op("Abs", value), precision.block or size, precision.blocks(size)
    if blocks == 1:
        return graph.largest(value, axis)
    if block == 1:
        return value
    behind, before = list(spec.shape[len(spec.shape) + axis + 1 :]), 1 + len(spec.shape) + axis
    if missing := blocks * block - size:
        rank = 1 + len(spec.shape)
        pads = [0] * (rank + before) + [missing] + [0] * len(behind)
        value = graph.op("Pad", value, graph.constant(pads))
    value = graph.reshape(value, *[0] * before, blocks, block, *behind)
    return graph.reshape(graph.largest(value, axis), *[0] * before, blocks, *behind)


def _dynamic(graph: Graph, absmax: Value, number_format: Format) -> tuple[Value, Value]:
    """The two entries that hold a scale."""
    least = graph.op("Div", absmax, _float(graph, MOST[number_format]))
    if number_format == "fp8-e4m3":
        return _fp8_codes(graph, graph.op("Max", least, _float(graph, 2.0**LEAST_EXPONENT)))
    least = graph.op("Max", least, _float(graph, 2.0 ** (LEAST_EXPONENT + 7)))
    exponent = graph.op("Sub", _log2(graph, least, floor=True), _float(graph, 7))
    mantissa = graph.op("Mul", least, _power(graph, graph.op("Neg", exponent)))
    above = graph.op("Cast", graph.op("Greater", mantissa, _float(graph, 255 + SLACK)), to=ir.DataType.FLOAT)
    halved = graph.op("Sub", mantissa, graph.op("Mul", graph.op("Mul", above, _float(graph, 0.5)), mantissa))
    mantissa, exponent = _rounded_up(graph, halved), graph.op("Add", exponent, above)
    if number_format == "int8":
        return graph.op("Sub", mantissa, _float(graph, OFFSET)), exponent
    return mantissa, graph.op("Add", exponent, _float(graph, OFFSET))


def _fp8_codes(graph: Graph, least: Value) -> tuple[Value, Value]:
    """A number of three bits behind the first, rounded up, and a power of 2^14."""
    shifted = graph.op("Add", _log2(graph, least), _float(graph, 6))
    power = graph.op("Floor", graph.op("Div", shifted, _float(graph, FP8_POWER)))
    rest = graph.op("Mul", least, _power(graph, graph.op("Mul", power, _float(graph, -FP8_POWER))))
    exponent = graph.op("Sub", _log2(graph, rest, floor=True), _float(graph, 3))
    steps = _rounded_up(graph, graph.op("Mul", rest, _power(graph, graph.op("Neg", exponent))))
    return graph.op("Mul", steps, _power(graph, exponent)), power


def _rounded_up(graph: Graph, steps: Value) -> Value:
    return graph.op("Ceil", graph.op("Sub", steps, _float(graph, SLACK)))


def _scale(graph: Graph, first: Value, second: Value, number_format: Format) -> Value:
    if number_format == "fp8-e4m3":
        return graph.op("Mul", first, _power(graph, graph.op("Mul", second, _float(graph, FP8_POWER))))
    if number_format == "int8":
        return graph.op("Mul", graph.op("Add", first, _float(graph, OFFSET)), _power(graph, second))
    return graph.op("Mul", first, _power(graph, second, offset=0))


def _log2(graph: Graph, value: Value, floor: bool = False) -> Value:
    found = graph.op("Mul", graph.op("Log", value), _float(graph, 1 / math.log(2)))
    return graph.op("Floor", found) if floor else found


def _power(graph: Graph, exponent: Value, offset: int = OFFSET) -> Value:
    """2 to the power of whole numbers of float32 from -128 to 127, once `offset` is theirs no more."""
    table = graph.constant(np.ldexp(np.float32(1), np.arange(-OFFSET, OFFSET)), FLOAT)
    place = graph.op("Add", exponent, _float(graph, offset)) if offset else exponent
    return graph.op("Gather", table, graph.op("Cast", place, to=ir.DataType.INT64), axis=0)


# values


def _on_grid(graph: Graph, scaled: Value, number_format: Format, dithers: Value | None) -> Value:
    most = MOST[number_format]
    if number_format != "fp8-e4m3":
        scaled = graph.op("Round", scaled) if dithers is None else graph.op("Floor", graph.op("Add", scaled, dithers))
    return graph.op("Clip", scaled, _float(graph, -most), _float(graph, most))


def _packed(graph: Graph, whole: Value, axis: int, size: int) -> Value:
    """Whole numbers two to a byte."""
    if size % 2:
        whole = graph.op("Concat", whole, _zeros_beside(graph, whole, axis), axis=axis)
    low, high = graph.several(2, "Split", _wrapped(graph, whole), axis=axis, num_outputs=2)
    return graph.op("Add", low, graph.op("Mul", high, _float(graph, NIBBLE)))


def _zeros_beside(graph: Graph, whole: Value, axis: int) -> Value:
    """One more entry along the axis."""
    first = graph.op("Slice", whole, graph.constant([0]), graph.constant([1]), graph.constant([axis]))
    return graph.op("Mul", first, _float(graph, 0))


def _unpacked(graph: Graph, entries: Value, axis: int, size: int) -> Value:
    high = graph.op("Floor", graph.op("Mul", entries, _float(graph, 1 / NIBBLE)))
    low = graph.op("Sub", entries, graph.op("Mul", high, _float(graph, NIBBLE)))
    whole = _wrapped(graph, graph.op("Concat", low, high, axis=axis))
    if size % 2 == 0:
        return whole
    return graph.op("Slice", whole, graph.constant([0]), graph.constant([size]), graph.constant([axis]))


def _wrapped(graph: Graph, whole: Value) -> Value:
    """-8 to 7 as 0 to 15 and back: two's complement in four bits."""
    turns = graph.op("Floor", graph.op("Mul", whole, _float(graph, 2 / NIBBLE)))
    return graph.op("Sub", whole, graph.op("Mul", turns, _float(graph, NIBBLE)))


def dithers(graph: Graph, spec: StateSpec, position: Value) -> Value:
    """u in [0, 1) for every entry; `position` int64, [B, 1, ...], counts real tokens, along the axis that grows too.

    Both terms are whole numbers of 1/131072, so that their sum is exact.
    """
    by_position, by_place, period = STEPS
    moved = graph.op("Mod", graph.op("Mul", position, graph.constant(by_position)), graph.constant(period))
    moved = graph.op("Mul", graph.op("Cast", moved, to=ir.DataType.FLOAT), _float(graph, 1 / period))
    own = [1, *(1 if axis == spec.grows else size for axis, size in enumerate(spec.shape))]
    places = graph.op("Range", *(graph.constant(n) for n in (0, math.prod(own), 1)))
    places = graph.op("Add", graph.op("Mul", places, graph.constant(by_place)), graph.constant(spec.precision.seed))
    places = graph.op("Cast", graph.op("Mod", places, graph.constant(period)), to=ir.DataType.FLOAT)
    places = graph.op("Add", places, _float(graph, 0.5))
    places = graph.reshape(graph.op("Mul", places, _float(graph, 1 / period)), *own)
    total = graph.op("Add", moved, places)
    return graph.op("Sub", total, graph.op("Floor", total))


def _float(graph: Graph, value: float) -> Value:
    return graph.constant(value, FLOAT)
