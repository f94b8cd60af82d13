"""Two artifacts that neither is the truth, or one and its earlier self: what is better, what is worse, what cannot be told.

Both were measured on the same windows, which are drawn anew together, as `statistics` has it.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from compress.check import statistics
from compress.check.standing import OnText, Standing, as_array
from compress.check.statistics import Array, Interval
from compress.recipe.check import PHASES
from compress.strict.json_text import finite

ChangeName = Literal[
    "perplexity",
    "top1_accuracy",
    "kl_divergence_mean",
    "top1_agreement",
    "recall_accuracy",
    "task_accuracy",
    "weight_bytes",
]
ChangeOutcome = Literal["better", "worse", "undecided", "same"]
LOWER_IS_BETTER = ("perplexity", "kl_divergence_mean", "weight_bytes")
SHARES = ("top1_accuracy", "top1_agreement", "recall_accuracy", "task_accuracy")
NO_SMALLER_PERPLEXITY = 1e-4  # of the old one: a difference within it is that of rounding in another order
NO_SMALLER_DIVERGENCE = 1e-6  # nats: what a sum over a vocabulary in float32 is exact to


class ChangeFacts(TypedDict):
    """`difference` is new minus old, `low` and `high` its 95 % interval, which is that of all metrics of a table together. None is
    not finite, or cannot be told; bytes have no phase and no interval."""

    metric: ChangeName
    phase: str | None
    old: float | None
    new: float | None
    difference: float | None
    low: float | None
    high: float | None
    outcome: ChangeOutcome


@dataclass(frozen=True)
class Paired:
    """A mean on the same windows before and after: the sums of each [W] and what they are divided by, [W]; so many windows are
    of each prompt set."""

    metric: ChangeName
    phase: str
    old: Array
    new: Array
    counts: Array
    strata: tuple[int, ...]


def between(old: Standing, new: Standing) -> list[ChangeFacts]:
    """Of all that both were measured by."""
    paired = [one for phase in PHASES for one in _of_text(phase, *_pairs(old, new, phase))]
    before, after = ([np.array(task.right, float) for task in one.tasks] for one in (old, new))
    if before:
        strata = tuple(map(len, before))
        paired.append(_paired("task_accuracy", "prefill", before, after, list(map(np.ones, strata)), strata))
    level = _together({one.metric for one in paired})
    return [*(_row(one, level) for one in paired), _of_bytes(old.weight_bytes, new.weight_bytes)]


def _together(metrics: Collection[ChangeName]) -> float:
    """The level of each interval, so that those of all metrics hold together as one would (Bonferroni): else one row in forty is
    worse by chance, and a table of them far oftener. Both phases of a metric count as one, since they hardly differ."""
    return 1 - (1 - statistics.LEVEL) / max(1, len(metrics))


def worse(changes: Sequence[ChangeFacts]) -> list[ChangeFacts]:
    """Those that say the new one is less accurate; size is no accuracy."""
    return [row for row in changes if row["outcome"] == "worse" and row["metric"] != "weight_bytes"]


def _pairs(old: Standing, new: Standing, phase: str) -> tuple[list[OnText], list[OnText]]:
    """The sets of a phase that both have, in the same order. Of a set that was measured twice the second time counts."""
    before = {one.prompts: one for one in old.text if one.phase == phase}
    after = [one for one in new.text if one.phase == phase and one.prompts in before]
    return [before[one.prompts] for one in after], after


def _of_text(phase: str, old: Sequence[OnText], new: Sequence[OnText]) -> Iterator[Paired]:
    def paired(metric: ChangeName, tops: Callable[[OnText], Sequence[float | None]],
               bottoms: Callable[[OnText], Sequence[int]]) -> Iterator[Paired]:  # fmt: skip
        """Nothing where one of the two was not measured by it."""
        before, after = ([as_array(tops(one)) for one in both] for both in (old, new))
        if sum(map(len, before)) and sum(map(len, after)):
            strata = tuple(map(len, before))
            yield _paired(metric, phase, before, after, [np.array(bottoms(one)) for one in new if tops(one)], strata)

    yield from paired("perplexity", lambda one: one.nll, lambda one: one.positions)
    yield from paired("top1_accuracy", lambda one: one.right, lambda one: one.positions)
    yield from paired("kl_divergence_mean", lambda one: one.kl_divergence, lambda one: one.positions)
    yield from paired("top1_agreement", lambda one: one.same_top1, lambda one: one.positions)
    yield from paired("recall_accuracy", lambda one: one.answered, lambda one: one.asked)


def _paired(metric: ChangeName, phase: str, old: Sequence[Array], new: Sequence[Array], counts: Sequence[Array],
            strata: tuple[int, ...]) -> Paired:  # fmt: skip
    return Paired(metric, phase, np.concatenate(old), np.concatenate(new), np.concatenate(counts), strata)


def _row(paired: Paired, level: float) -> ChangeFacts:
    statistics_of = [_statistic(paired.metric, sums, paired.counts) for sums in (paired.old, paired.new)]
    whole = np.ones((1, len(paired.counts)))
    with np.errstate(over="ignore", invalid="ignore"):
        old, new = (float(statistic(whole)[0]) for statistic in statistics_of)
    interval = _interval(paired, level, *statistics_of) if math.isfinite(old) and math.isfinite(new) else None
    low, high = interval or (None, None)
    return {
        "metric": paired.metric,
        "phase": paired.phase,
        "old": finite(old),
        "new": finite(new),
        "difference": finite(new - old),
        "low": low,
        "high": high,
        "outcome": _outcome(paired, old, new, interval),
    }


def _statistic(metric: ChangeName, sums: Array, counts: Array) -> statistics.Statistic:
    mean = statistics.ratio(sums, counts)
    return statistics.exp(mean) if metric == "perplexity" else mean


def _interval(paired: Paired, level: float, old: statistics.Statistic, new: statistics.Statistic) -> Interval | None:
    """Of shares where nothing changed, as many as may have without being seen."""
    if not np.array_equal(paired.old, paired.new):
        within = (-1.0, 1.0) if paired.metric in SHARES else (-math.inf, math.inf)
        return statistics.interval(lambda drawn: new(drawn) - old(drawn), paired.strata, within, level)
    return statistics.of_no_change(int(paired.counts.sum())) if paired.metric in SHARES else (0.0, 0.0)


def _outcome(paired: Paired, old: float, new: float, interval: Interval | None) -> ChangeOutcome:
    if not (math.isfinite(old) and math.isfinite(new)):
        return "undecided" if math.isfinite(old) == math.isfinite(new) else "better" if math.isfinite(new) else "worse"
    if np.array_equal(paired.old, paired.new):
        return "same"
    if interval is None:
        return "undecided"
    if max(map(abs, interval)) <= _no_smaller(paired.metric, old):
        return "same"
    if interval[0] <= 0 <= interval[1]:
        return "undecided"
    return "better" if (interval[1] < 0) == (paired.metric in LOWER_IS_BETTER) else "worse"


def _no_smaller(metric: ChangeName, old: float) -> float:
    """Differences up to this say nothing."""
    if metric == "perplexity":
        return NO_SMALLER_PERPLEXITY * old
    return NO_SMALLER_DIVERGENCE if metric == "kl_divergence_mean" else 0.0


def _of_bytes(old: int, new: int) -> ChangeFacts:
    return {
        "metric": "weight_bytes",
        "phase": None,
        "old": old,
        "new": new,
        "difference": new - old,
        "low": None,
        "high": None,
        "outcome": "same" if old == new else "better" if new < old else "worse",
    }
