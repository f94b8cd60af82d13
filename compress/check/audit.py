"""Every stored tensor against what the original and the records say it ought to be.

What no pass touched is the same bit for bit. What was rounded differs by what its format and method explain: the relative error

    |stored - ought| / |ought|      (Frobenius norms)

of rounding to nearest in the same format, times a factor for the method. GPTQ (Frantar et al., arXiv 2210.17323) makes errors of a
row compensate each other at the layer's output, and so larger themselves.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, NotRequired, TypedDict

from compress import formats
from compress.model.hybrid import HybridModel
from compress.model.replay import Ought, replayed, since
from compress.model.roles import Role
from compress.model.weight import Weight
from compress.passes.quantization import rounding

FACTORS = {None: 1.05, "nearest": 1.05, "gptq": 1.8}  # of rounding to nearest; docs/checks.md has where they come from


class AuditFacts(TypedDict):
    """A row as JSON has it; the error is None where the original has nothing to compare with, or a value is not finite."""

    artifact: str
    tensor: str
    format: str
    relative_error: float | None
    expected_at_most: float | None
    passed: bool
    note: NotRequired[str]


class Judged(NamedTuple):
    error: float | None
    most: float | None
    passed: bool
    note: str | None = None


def audit(artifact: str, original: HybridModel, candidate: HybridModel) -> Iterator[AuditFacts]:
    """A row for each tensor of the candidate, and for each that it lacks."""
    done = since(original.config.compress.passes, candidate.config.compress.passes)
    ought = replayed(original.weights, done)
    for weight in candidate.weights:
        yield _row(artifact, weight.name, weight.format, _judged(weight, ought.get(weight.name)))
    stored = {weight.name for weight in candidate.weights}
    for name, missing in ought.items():
        if name not in stored and missing.weight is not None and missing.weight.role != Role.MTP:
            yield _row(artifact, name, missing.weight.format, Judged(None, None, False, "is not there"))


def _row(artifact: str, tensor: str, number_format: str, judged: Judged) -> AuditFacts:
    row: AuditFacts = {
        "artifact": artifact,
        "tensor": tensor,
        "format": number_format,
        "relative_error": judged.error,
        "expected_at_most": judged.most,
        "passed": judged.passed,
    }
    return row if judged.note is None else row | {"note": judged.note}


def _judged(stored: Weight, ought: Ought | None) -> Judged:
    if ought is None:
        return Judged(None, None, False, "is not in the original, and no pass says that it made it")
    if ought.weight is None:
        return Judged(None, None, True, "was made by a pass")
    if stored.shape != ought.weight.shape:
        return Judged(None, None, False, f"has shape {list(stored.shape)}, expected {list(ought.weight.shape)}")
    error = _relative(stored, ought.weight)
    if not math.isfinite(error):
        return Judged(None, None, False, "holds values that are not finite")
    if not ought.follows:
        return Judged(error, None, True, "was computed anew by a pass")
    most = _explained(stored, ought)
    return Judged(error, most, error <= most)


def _relative(stored: Weight, ought: Weight) -> float:
    """|stored - ought| / |ought|, block of rows by block of rows."""
    lost, whole = 0.0, 0.0
    for rows in stored.row_blocks():
        expected = ought.dense(rows)
        lost += float((stored.dense(rows) - expected).double().square().sum())
        whole += float(expected.double().square().sum())
    return math.sqrt(lost / whole) if whole > 0 else math.sqrt(lost)


def _explained(stored: Weight, ought: Ought) -> float:
    """The relative error that the stored format accounts for."""
    assert ought.weight is not None
    if stored.format == ought.weight.format:
        return 0.0
    nearest = _relative(_to_nearest(stored, ought.weight), ought.weight)
    return nearest * FACTORS[ought.method] if stored.is_quantized else nearest


def _to_nearest(stored: Weight, ought: Weight) -> Weight:
    """What ought to be there, rounded to nearest in the stored format."""
    if not stored.is_quantized:
        return rounding.as_plain(ought, stored.format)
    return rounding.to_nearest(ought, formats.get(stored.format), clips=False, rotation=stored.rotation)
