"""What a model remembers in number formats, in a graph: as compress/formats/remembered.py has it, to the last bit.

Powers come from tables, since no two runtimes have the same last bit of one. Which power it is comes from a logarithm, which may
differ where it lies halfway between two.
"""

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.remembered import (
    DIGITS,
    FLOATS,
    LEAST_POWER,
    MOST,
    MOST_POWER,
    NIBBLE,
    PARTS,
    POWER_STEPS,
    SCALE_ENTRIES,
    STEPS,
    Precision,
)
from compress.formats.state_words import Format
from compress.model.states import StateSpec
from exporters.graph.builder import DTYPES, FLOAT, Dimension, Graph
from exporters.graph.cadence import chosen
from exporters.graph.mamba import END
from exporters.graph.stored import repeated

Value = ir.Value

MOST_EXPONENT = 126  # of float32, and one less: twice that is still a number


def restored_shape(spec: StateSpec, stored: tuple[Dimension, ...]) -> list[Dimension]:
    """Of a state as arithmetic takes it, batch and tokens as in the stored one."""
    return [stored[0], *(stored[1 + axis] if axis == spec.grows else size for axis, size in enumerate(spec.shape))]


def decoded(graph: Graph, spec: StateSpec, stored: Value, scales: Value | None) -> Value:
    """A state as stored -> float32 [B, ...]; `scales` are static ones."""
    precision, axis, size = spec.precision, spec.precision.axis, spec.shape[spec.precision.axis]
    entries = _float32(graph, stored, precision)
    if scales is None:
        blocks = precision.blocks(size)
        count = SCALE_ENTRIES[precision.format]
        parts = graph.constant([precision.stored_size(size) - count * blocks, *[blocks] * count])
        entries, *digits = graph.several(1 + count, "Split", entries, parts, axis=axis)
        scales = _scale(graph, digits, precision.format)
    if precision.format == "int4":
        entries = _unpacked(graph, entries, axis, size)
    return graph.op("Mul", entries, _for_entries(graph, scales, precision, size))


def kept_on(
    graph: Graph,
    spec: StateSpec,
    value: Value,
    kept: Value,
    dithers: Value | None,
    scales: Value | None,
    due: Value | None = None,
) -> Value:
    """A state after this call, float32 [B, ...], as it is stored; of one that grows, what was kept and the new entries. In rows
    that are not `due`, bool [B, 1], what was kept."""
    if spec.grows is None:
        value = graph.reshape(value, 0, *spec.shape)  # which tools that infer shapes do not all know
        entries = encoded(graph, spec, value, dithers, scales)
        if due is not None:
            past = _float32(graph, kept, spec.precision)
            entries = chosen(graph, due, entries, past, 1 + len(spec.shape))
        return _typed(graph, entries, spec.precision)
    new = encoded(graph, spec, new_of(graph, spec, value, kept), dithers, scales)
    axis = spec.grows + 1
    if DTYPES[spec.precision.dtype] not in graph.unmoved:
        return graph.op("Concat", kept, _typed(graph, new, spec.precision), axis=axis)
    past = _float32(graph, kept, spec.precision)
    return _typed(graph, graph.op("Concat", past, new, axis=axis), spec.precision)


def new_of(graph: Graph, spec: StateSpec, value: Value, kept: Value) -> Value:
    """The entries of the new tokens."""
    assert spec.grows is not None, spec.name
    axis = spec.grows + 1
    return graph.op("Slice", value, graph.shape_of(kept, axis), graph.constant([END]), graph.constant([axis]))


def encoded(graph: Graph, spec: StateSpec, value: Value, dithers: Value | None, scales: Value | None) -> Value:
    """float32 [B, ...] -> what is stored, still as float32."""
    precision, axis, size = spec.precision, spec.precision.axis, spec.shape[spec.precision.axis]
    if precision.is_plain:
        return value if dithers is None else _dithered(graph, value, dithers, precision.format)
    codes: list[Value] = []
    if scales is None:
        codes, scales = _dynamic(graph, _largest(graph, value, spec), precision.format)
    scaled = graph.op("Div", value, _for_entries(graph, scales, precision, size))
    whole = _on_grid(graph, scaled, precision.format, dithers)
    if precision.format == "int4":
        whole = _packed(graph, whole, axis, size)
    return graph.op("Concat", whole, *codes, axis=axis) if codes else whole


def _typed(graph: Graph, entries: Value, precision: Precision) -> Value:
    return graph.cast(entries, DTYPES[precision.dtype], ir.DataType.FLOAT)


def _float32(graph: Graph, stored: Value, precision: Precision) -> Value:
    return graph.cast(stored, ir.DataType.FLOAT, DTYPES[precision.dtype])


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


def _dynamic(graph: Graph, absmax: Value, number_format: Format) -> tuple[list[Value], Value]:
    """The entries that hold a scale, and the scale."""
    least = graph.op("Div", absmax, _float(graph, MOST[number_format]))
    least = graph.op("Clip", least, _float(graph, 2.0**LEAST_POWER), _float(graph, 2.0**MOST_POWER))
    steps = graph.op("Mul", graph.op("Log", least), _float(graph, POWER_STEPS / math.log(2)))
    code = graph.op("Round", graph.op("Sub", steps, _float(graph, LEAST_POWER * POWER_STEPS)))
    return _digits(graph, code, number_format), _power(graph, code)


def _digits(graph: Graph, code: Value, number_format: Format) -> list[Value]:
    """A number below 2^16 in entries of the stored type, the highest digit first."""
    base, shift = DIGITS[number_format]
    found: list[Value] = []
    for _ in range(SCALE_ENTRIES[number_format]):
        higher = graph.op("Floor", graph.op("Mul", code, _float(graph, 1 / base)))
        digit = graph.op("Sub", code, graph.op("Mul", higher, _float(graph, base)))
        found.insert(0, graph.op("Sub", digit, _float(graph, shift)) if shift else digit)
        code = higher
    return found


def _scale(graph: Graph, digits: Sequence[Value], number_format: Format) -> Value:
    """From its entries."""
    base, shift = DIGITS[number_format]
    code = digits[0]
    for digit in digits[1:]:
        code = graph.op("Add", graph.op("Mul", code, _float(graph, base)), digit)
    offset = shift * sum(base**place for place in range(len(digits)))
    return _power(graph, graph.op("Add", code, _float(graph, offset)) if offset else code)


def _power(graph: Graph, code: Value) -> Value:
    """2^(k / 1024 - 44)."""
    powers = np.ldexp(np.float32(1), np.arange(LEAST_POWER, MOST_POWER + 1))
    whole = graph.op("Floor", graph.op("Mul", code, _float(graph, 1 / POWER_STEPS)))
    part = graph.op("Sub", code, graph.op("Mul", whole, _float(graph, POWER_STEPS)))
    found = [
        graph.op("Gather", graph.constant(table, FLOAT), graph.op("Cast", place, to=ir.DataType.INT64), axis=0)
        for table, place in ((powers, whole), (PARTS, part))
    ]
    return graph.op("Mul", *found)


# values


def _on_grid(graph: Graph, scaled: Value, number_format: Format, dithers: Value | None) -> Value:
    most = MOST[number_format]
    if number_format != "fp8-e4m3":
        scaled = graph.op("Round", scaled) if dithers is None else graph.op("Floor", graph.op("Add", scaled, dithers))
    clipped = graph.op("Clip", scaled, _float(graph, -most), _float(graph, most))
    if number_format != "fp8-e4m3" or dithers is None:
        return clipped
    return _dithered(graph, clipped, dithers, number_format)


def _dithered(graph: Graph, value: Value, dithers: Value, number_format: Format) -> Value:
    """Rounded down or up to a number that the format has, by the dither."""
    bits, least = FLOATS[number_format]
    step = graph.op("Mul", _power_below(graph, graph.op("Abs", value), least), _float(graph, 2.0**-bits))
    steps = graph.op("Div", value, step)
    below = graph.op("Floor", steps)
    up = graph.op("Floor", graph.op("Add", graph.op("Sub", steps, below), dithers))
    return graph.op("Mul", graph.op("Add", below, up), step)


def _power_below(graph: Graph, size: Value, least: int) -> Value:
    """The largest power of two that is not above, from 2^least on. The logarithm may miss it by one."""
    two, half = _float(graph, 2), _float(graph, 0.5)
    size = graph.op("Clip", size, _float(graph, 2.0**least), _float(graph, 2.0**MOST_EXPONENT))
    exponent = graph.op("Floor", graph.op("Mul", graph.op("Log", size), _float(graph, 1 / math.log(2))))
    exponent = graph.op("Clip", exponent, _float(graph, least), _float(graph, MOST_EXPONENT))
    place = graph.op("Cast", graph.op("Sub", exponent, _float(graph, least)), to=ir.DataType.INT64)
    powers = np.ldexp(np.float32(1), np.arange(least, MOST_EXPONENT + 1))
    power = graph.op("Gather", graph.constant(powers, FLOAT), place, axis=0)
    power = graph.op("Where", graph.op("Less", size, power), graph.op("Mul", power, half), power)
    above = graph.op("Mul", power, two)
    return graph.op("Where", graph.op("Less", size, above), power, above)


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
