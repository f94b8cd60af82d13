"""From values to places on an axis, and the ticks people expect there."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

TICKS = 5  # intervals between ticks, about
MOST_LABELS = 10  # of a few letters, beside each other


class Scale(NamedTuple):
    """`place` maps a value to 0 .. 1, `ticks` are values with their labels."""

    place: Callable[[float], float]
    ticks: list[tuple[float, str]]


def linear(values: Sequence[float], *, from_zero: bool = False) -> Scale:
    """With round ticks around all values."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    low = min(low, 0.0) if from_zero else low
    if high <= low:
        low, high = low - (abs(low) or 1) * (not from_zero) / 2, high + (abs(high) or 1) / 2
    step = _round_step((high - low) / TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    bottom, top = first * step, last * step
    ticks = [(n * step, _label(n * step)) for n in range(first, last + 1)]
    return Scale(lambda value: (value - bottom) / (top - bottom), ticks)


def logarithmic(values: Sequence[float], words: Callable[[float], str], base: float = 10.0) -> Scale:
    """With a tick at every power of the base that is in reach, or every so many. Values are above 0."""
    first, last = math.floor(math.log(min(values), base) + 1e-9), math.ceil(math.log(max(values), base) - 1e-9)
    last = max(last, first + 1)
    step = -(-(last - first) // TICKS)
    ticks = [(base**n, words(base**n)) for n in range(first, last + 1, step)]
    return Scale(lambda value: (math.log(max(value, base**first), base) - first) / (last - first), ticks)


def named(labels: Sequence[str]) -> Scale:
    """Values are the places in the list; each has the room of one, so that a single one stands in the middle. Of many labels
    every so many are shown."""
    count = max(len(labels), 1)
    step = -(-count // MOST_LABELS)
    return Scale(lambda value: (value + 0.5) / count, [(float(n), labels[n]) for n in range(0, len(labels), step)])


def _round_step(least: float) -> float:
    """1, 2 or 5 times a power of ten, at least so much."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def _label(value: float) -> str:
    return f"{value:.4g}" if abs(value) > 1e-15 else "0"


def short(count: int) -> str:
    """Such as `64` or `16K`."""
    return str(count) if count < 1024 else f"{count / 1024:.3g}K"


def bytes_words(value: float) -> str:
    """Such as `1.2 MiB`."""
    power = 0 if value < 1024 else min(int(math.log2(value)) // 10, 4)
    return f"{value / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
