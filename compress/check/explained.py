"""How far a stored tensor may be from what it ought to be: what its format and method explain.

The relative error |stored - ought| / |ought| of rounding to nearest in the same format is computed, and times a factor it bounds

- the tensor,
- each row and each column (whichever is more, its own or the tensor's): a fault in few of them is lost in the whole.

Rounding points nowhere, so that the gain <stored, ought> / <ought, ought> is 1, but for what clipping takes from few bits: of the
tensor, and of each row as far as chance lets it. No column that counts is all zero.

Scales that are stored in a narrower type than the format's, as TensorRT takes them in the type of hidden states, are rounded once
more, by no more than that type's unit roundoff u (Higham, Accuracy and Stability of Numerical Algorithms, 2002, theorem 2.2): each
value by at most u of itself, and so errors and gains of rows, columns and the tensor by at most u (triangle inequality).

GPTQ (Frantar et al., arXiv 2210.17323) makes errors compensate each other at the layer's output, and so larger themselves; the
output, which it is for, is looked at in `layer_audit`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from compress import formats
from compress.check import discrepancy
from compress.check.discrepancy import Discrepancy
from compress.model.replay import Method
from compress.model.weight import Weight


class Factors(NamedTuple):
    """Of rounding to nearest, for the tensor, for a row, for a column."""

    whole: float
    row: float
    column: float


# Measured over shipped recipes' checkpoints of the two reference models, some calibrated on 256 tokens (docs/audit.md): rounding to
# nearest 1.01, 1.14, 1.03 at most (searched scales, scales in a byte), GPTQ 2.8, 10.8, 22.
FACTORS: dict[Method | None, Factors] = {
    "nearest": Factors(1.05, 1.3, 1.15),
    "gptq": Factors(3.5, 16.0, 40.0),
}
# How far from 1 a gain may be, with e the relative error: LINEAR e + SHRUNK e^2 below, LINEAR e + GROWN e^2 above; measured: 0.08 e, and
# 1.5 e^2 for four bits, whose largest values are clipped.
LINEAR, SHRUNK, GROWN = 0.12, 1.6, 0.2
# The same of a row of K values, whose errors add up to something by chance: SPREAD e / sqrt(K) more; measured: 4.1.
SPREAD, LEAST_ROOM = 8.0, 1e-4


class Judged(NamedTuple):
    error: float | None
    most: float | None
    passed: bool
    note: str | None = None


class Bounds(NamedTuple):
    """Of rows, or of columns: what was found, and what it may be at most."""

    found: torch.Tensor
    most: torch.Tensor

    @property
    def excess(self) -> torch.Tensor:
        return self.found / self.most.clamp_min(discrepancy.LEAST)

    @property
    def worst(self) -> int:
        return int(self.excess.argmax())


def cast(found: Discrepancy, off: Discrepancy, *, is_kept: bool) -> Judged:
    """What was kept, or cast to another type: the same bit for bit."""
    if not off.error:
        return Judged(found.error, found.error, True)
    note = discrepancy.described(off, _over(off.rows), _over(off.columns), 0.0)
    return Judged(off.error, 0.0, False, f"{note}; it was {'kept as it came' if is_kept else 'only cast'}")


def _over(lost: torch.Tensor) -> torch.Tensor:
    """By how much rows or columns differ that may not differ at all."""
    return torch.where(lost > 0, 1 + lost / lost.max(), 0)


def roundoff(stored: Weight) -> float:
    """The share of itself that a scale may have lost to the type it is stored in."""
    dtype, exact = stored.scale_dtype, formats.get(stored.format).scale_dtype
    if dtype is None or torch.finfo(dtype).eps <= torch.finfo(exact).eps:
        return 0.0
    return torch.finfo(dtype).eps / 2


def rounded(found: Discrepancy, nearest: Discrepancy, factors: Factors, scales: float = 0.0) -> Judged:
    """What was quantized; `scales` is the share that scales may be off by beside."""
    most = factors.whole * nearest.error + scales
    return next(_violations(found, nearest, factors, most, scales), Judged(found.error, most, True))


def _violations(
    found: Discrepancy, nearest: Discrepancy, factors: Factors, most: float, scales: float
) -> Iterator[Judged]:
    rows = Bounds(found.by_row, factors.row * nearest.by_row.clamp_min(nearest.error) + scales)
    columns = Bounds(found.by_column, factors.column * nearest.by_column.clamp_min(nearest.error) + scales)
    words = discrepancy.described(found, rows.excess, columns.excess, most)
    if found.error > most:
        yield Judged(found.error, most, False, words)
    off, room = abs(found.gain - 1), _room(found.gain, found.error) + abs(nearest.gain - 1) + scales
    if off > room:
        yield Judged(off, room, False, f"is {found.gain:.3g} times what it ought to be")
    for bounds in (rows, columns):
        if float(bounds.excess[bounds.worst]) > 1:
            yield Judged(float(bounds.found[bounds.worst]), float(bounds.most[bounds.worst]), False, words)
    gains = _gains(found, nearest, scales)
    if float(gains.excess[gains.worst]) > 1:
        gain = float(found.gain_by_row[gains.worst])
        note = f"row {gains.worst} of {len(gains.most)} is {gain:.3g} times what it ought to be"
        yield Judged(float(gains.found[gains.worst]), float(gains.most[gains.worst]), False, note)
    if bool(found.emptied.any()):
        yield Judged(1.0, float(nearest.by_column[found.emptied].max()), False, discrepancy.emptied(found))


def _room(gain: float, error: float) -> float:
    return LINEAR * error + (SHRUNK if gain < 1 else GROWN) * error**2


def _gains(found: Discrepancy, nearest: Discrepancy, scales: float) -> Bounds:
    """How far the gains of rows are from 1, against what errors that point nowhere make of K values, beside rounding to nearest."""
    error, count = found.by_row, len(found.columns)
    off = (found.gain_by_row - 1).abs()
    room = LINEAR * error + SHRUNK * error**2 + SPREAD * error / count**0.5
    return Bounds(off, (room + (nearest.gain_by_row - 1).abs()).clamp_min(LEAST_ROOM) + scales)
