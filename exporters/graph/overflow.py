"""What of a model fp16 cannot hold, unit by unit: hidden states that come too near to its end, weights and scales out of its
range. Such units are refused, or kept in a wider type."""

from collections.abc import Mapping
from typing import NamedTuple

import onnx_ir as ir
import torch

from compress.calibration.ranges import Ranges
from compress.errors import InputError
from compress.formats.base import Quantized
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.model.weight import Unit, Weight, to_dense
from compress.output_folder.overflow_facts import OverflowFacts, UnitRange, called
from compress.terminal import progress

MOST = torch.finfo(torch.float16).max
LIMIT = MOST / 4  # other text, and sums on their way to a result, reach further than what was measured
ROUNDING = 2.0**-9  # of a tensor's largest number, or scale: a quarter of a step of int8
STAY_FLOAT32 = (Role.ROUTER, Role.SSM_A, Role.STATE_SCALE, Role.MTP)
WIDE = {"bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}
SHARED = ("embedding", "head")  # the units of a tied matrix


class Decided(NamedTuple):
    """The types of units that are not in fp16, and what build.json has of it."""

    types: Mapping[str, ir.DataType]
    facts: OverflowFacts


def decided(model: HybridModel, ranges: Ranges, on_overflow: str) -> Decided:
    """What becomes of the units that fp16 cannot hold: `refuse` raises InputError, else they are kept in that type."""
    found = unfit(model, ranges)
    if on_overflow == "refuse":
        _refuse(found)
    if model.is_tied and found.keys() & set(SHARED):
        found = dict.fromkeys(SHARED, "shares the tied matrix") | found
    types = dict.fromkeys(found, WIDE.get(on_overflow, ir.DataType.FLOAT16))
    units: list[UnitRange] = [
        {
            "unit": unit,
            "largest": peak.value,
            "where": peak.where,
            "type": on_overflow if unit in found else "fp16",
            "why": found.get(unit),
        }
        for unit, peak in ranges.peaks.items()
    ]
    return Decided(types, {"limit": LIMIT, "tokens": ranges.tokens, "units": units})


def _refuse(found: Mapping[str, str]) -> None:
    if not found:
        return
    (unit, why), *others = found.items()
    more = f" (and {len(others)} more)" if others else ""
    raise InputError(
        f"export.tensorrt: precision fp16 does not hold this model: {called(unit)}{more} {why}; on_overflow: bf16, or fp32, "
        "keeps such layers in that type, and precision: bf16 holds them all"
    )


def unfit(model: HybridModel, ranges: Ranges) -> dict[str, str]:
    """Units in order, each with words that follow it. Weights are read one at a time."""
    found = {}
    with progress.task("weights in fp16", model.parameters) as advance:
        for unit in model.units:
            if why := _beyond_limit(unit.name, ranges) or _weights_unfit(unit):
                found[unit.name] = why
            advance(sum(weight.parameters for weight in unit.weights.values()))
    return found


def _beyond_limit(unit: str, ranges: Ranges) -> str | None:
    peak = ranges.peaks[unit]
    if peak.value <= LIMIT:
        return None
    return f"reaches {peak.value:,.7g} in {peak.where} on the calibration tokens, of at most {LIMIT:,.0f} (65504 / 4)"


def _weights_unfit(unit: Unit) -> str | None:
    whys = (_weight_unfit(weight) for weight in unit.weights.values() if weight.role not in STAY_FLOAT32)
    return next((why for why in whys if why), None)


def _weight_unfit(weight: Weight) -> str | None:
    """Zeros in fp16, or almost, are no matter beside larger numbers of the same tensor: they would add as little there."""
    most, parts = 0.0, []
    for rows in weight.row_blocks():
        stored = weight.load(rows)
        most = max(most, float(to_dense(stored).abs().max()))
        parts.append(_Extent.of(stored.scales if isinstance(stored, Quantized) else stored))
    if most > MOST:
        return f"has tensor '{weight.name}', which holds {most:,.7g}; fp16 ends at {MOST:,.0f}"
    largest, lost = (max(values) for values in zip(*parts, strict=True))
    if lost > ROUNDING * largest:
        what = "scales" if weight.is_quantized else "numbers"
        return f"has tensor '{weight.name}', whose {what} fp16 cannot hold: they reach {largest:.3g}"
    return _inputs_unfit(weight)


class _Extent(NamedTuple):
    largest: float
    lost: float

    @classmethod
    def of(cls, stored: torch.Tensor) -> "_Extent":
        """The largest magnitude, and the most that fp16 takes from a number."""
        exact = stored.float()
        return cls(float(exact.abs().max()), float((exact.half().float() - exact).abs().max()))


def _inputs_unfit(weight: Weight) -> str | None:
    if weight.activation is None or weight.activation.scale is None:
        return None
    scale = weight.activation.scale()
    if _Extent.of(torch.tensor(scale)).lost <= ROUNDING * scale:
        return None
    return f"rounds the input of '{weight.name}' with a scale that fp16 cannot hold: {scale:.3g}"
