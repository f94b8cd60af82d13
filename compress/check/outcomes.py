"""What the interval of a figure says of its limit, and how much more text would say more.

A limit is held where the whole interval lies within it (an end that touches it does), missed where the whole interval lies
beyond it, and undecided in between: other text of the same kind might have come out the other way.
"""

import math
from typing import Literal

from compress.check.statistics import Interval
from compress.recipe.check import METRICS, MetricName

Outcome = Literal["held", "missed", "undecided"]
MOST_TOKENS = 10**12  # beyond any text: a figure so near its limit is on it


def outcome(metric: MetricName, limit: float, value: float, interval: Interval | None) -> Outcome:
    """A value that is not finite is missed, and so is the end of a metric's range where the text has any exception to it. Else a
    value without an interval tells nothing of other text."""
    if not math.isfinite(value) or (limit == METRICS[metric].best and not _is_within(metric, value, limit)):
        return "missed"
    if interval is None:
        return "undecided"
    inside = [
        _is_within(metric, edge, limit) for edge in (value, *interval)
    ]  # a skewed interval may leave its value out
    return "held" if all(inside) else "undecided" if any(inside) else "missed"


def more_tokens(limit: float, value: float, interval: Interval | None, tokens: int, narrowing: float) -> int | None:
    """How many more tokens make the interval end at the limit, if the value stays: its width goes with tokens ** -narrowing.
    None where there is no interval, or where the value is the limit."""
    if interval is None or not math.isfinite(value) or math.isclose(value, limit, rel_tol=1e-9):
        return None
    reach = interval[1] - value if value < limit else value - interval[0]
    more = tokens * (max(1.0, reach / abs(limit - value)) ** (1 / narrowing) - 1)
    return max(1, math.ceil(more)) if more < MOST_TOKENS else None


def _is_within(metric: MetricName, edge: float, limit: float) -> bool:
    """Sums in another order do not put a figure beyond its limit."""
    return METRICS[metric].holds(edge, limit) or math.isclose(edge, limit, rel_tol=1e-9)
