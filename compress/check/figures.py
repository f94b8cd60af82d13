"""What a check finds of one metric: the value, of how many positions, and how sure it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.check import statistics
from compress.check.metrics import STATISTICS, Scores
from compress.check.statistics import Array, Interval, Statistic
from compress.recipe.check import METRICS, MetricName

ONE_WINDOW = "a single window, which tells no interval; more text or a smaller 'length' gives several"
NOT_FINITE = "a window weighs so much that the figure is not finite where it is drawn often; worst_prompts has it"


@dataclass(frozen=True)
class Figure:
    """`interval` is None where it cannot be told, as of one window; its width goes with the amount of text to the power of
    -`narrowing`."""

    value: float
    positions: int
    windows: int
    interval: Interval | None
    narrowing: float = 0.5

    @property
    def note(self) -> str | None:
        if self.windows == 1:
            return ONE_WINDOW
        return NOT_FINITE if self.interval is None and math.isfinite(self.value) else None


def of(metric: MetricName, sets: Sequence[Sequence[Scores]]) -> Figure:
    """A metric of `STATISTICS`, over windows by prompt set; some window has positions."""
    windows = [scores for of_set in sets for scores in of_set]
    strata, within = [len(of_set) for of_set in sets], (METRICS[metric].least, METRICS[metric].most)
    return figure(STATISTICS[metric](windows), strata, sum(map(len, windows)), within)


def figure(statistic: Statistic, strata: Sequence[int], positions: int, within: Interval = (0, math.inf)) -> Figure:
    """Of windows, of which each prompt set has so many, with so many positions together; no value is beyond `within`."""
    value = statistics.value(statistic, sum(strata))
    interval = statistics.interval(statistic, strata, within) if math.isfinite(value) else None
    return Figure(value, positions, sum(strata), interval)


def drop(lost: Array, trials: Array, strata: Sequence[int], *, has_changed: bool) -> Figure:
    """How much of a rate was lost, by what is drawn anew, [W] each; so many of them are of each set. Where nothing changed, as
    much may have changed as is not seen among so few."""
    if has_changed or len(trials) == 1:
        interval, narrowing = statistics.interval(statistics.ratio(lost, trials), strata, within=(-1, 1)), 0.5
    else:
        interval, narrowing = statistics.of_no_change(int(trials.sum())), 1.0
    return Figure(float(lost.sum() / trials.sum()), int(trials.sum()), len(trials), interval, narrowing)
