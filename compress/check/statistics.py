"""How sure a figure is: 95 % intervals from a paired bootstrap over windows.

Positions of a window depend on each other, windows do not: windows are drawn anew with replacement, as many from each prompt
set as it has, and the figure is computed again of what was drawn, baseline and candidate on the same windows. The interval is
BCa (Efron 1987), which follows the skew of divergences. Any such interval is too narrow where windows are few, so its level is
raised by what Student's t has over the normal distribution (Hesterberg 2015, "expanded"). It never reaches beyond what single
windows give, which two or three of them do not span: there it is at least that of Student's t with the jackknife's error.
"""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 2000
BATCH = 250  # resamples computed together: of a percentile, each takes memory for all positions near it
SEED = 13
FEW = 6  # windows: from so many on the two intervals are about as wide

Array = np.ndarray
Statistic = Callable[[Array], Array]  # how often each window counts [R, W] -> the figure of each row [R]
Interval = tuple[float, float]


def ratio(tops: Array, bottoms: Array) -> Statistic:
    """The sum over windows of `tops` [W] by that of `bottoms` [W]: means over positions, differences of rates."""
    return lambda counts: (counts @ tops) / (counts @ bottoms)


def exp(statistic: Statistic) -> Statistic:
    """Of means of log-probabilities: perplexities and their ratios."""
    return lambda counts: np.exp(statistic(counts))


def root(statistic: Statistic) -> Statistic:
    """Of mean squares."""
    return lambda counts: np.sqrt(statistic(counts))


def share(statistic: Statistic, whole: Statistic) -> Statistic:
    """One figure by another; 1 where the whole is 0, as where nothing differs."""

    def figure(counts: Array) -> Array:
        top, bottom = statistic(counts), whole(counts)
        return np.divide(top, bottom, out=np.ones_like(bottom), where=bottom != 0)

    return figure


def value(statistic: Statistic, windows: int) -> float:
    """The figure of the windows as they are; NaN or infinite where that of some position is."""
    with np.errstate(all="ignore"):
        return float(statistic(np.ones((1, windows), np.int64))[0])


def percentile(windows: Sequence[Array], percent: float) -> Statistic:
    """Of all positions of the windows, as numpy interpolates it; NaN where some value is."""
    if any(np.isnan(window).any() for window in windows):
        return lambda counts: np.full(len(counts), np.nan)
    lengths = np.array([len(window) for window in windows])
    ranked = _Ranked(windows, lengths)

    def figure(counts: Array) -> Array:
        place = (counts @ lengths - 1) * (percent / 100)
        lower = np.floor(place).astype(np.int64)
        below, above = ranked.at(counts, lower), ranked.at(counts, lower + 1)
        mixed: Array = below + np.where(above == below, 0, above - below) * (place - lower)  # infinite ones too
        return mixed

    return figure


class _Ranked:
    """The positions of windows by their value, in blocks: those drawn are counted block by block first, then within one."""

    def __init__(self, windows: Sequence[Array], lengths: Array):
        values = np.concatenate(windows)
        order = np.argsort(values, kind="stable")
        self._values, self._owners = values[order], np.repeat(np.arange(len(windows)), lengths)[order]
        self._step = math.isqrt(len(values)) + 1
        self._starts = np.arange(0, len(values), self._step)
        blocks = len(self._starts)
        cells = self._owners * blocks + np.arange(len(values)) // self._step
        of_block = np.bincount(cells, minlength=len(windows) * blocks).reshape(len(windows), blocks)
        self._before = np.cumsum(of_block, axis=1) - of_block  # [W, blocks]

    def at(self, counts: Array, rank: Array) -> Array:
        """The values of the drawn positions of these ranks [R], from 0; of the last where there are fewer."""
        before, rows = (
            counts @ self._before.astype(float),
            np.arange(len(counts)),
        )  # [R, blocks]; quicker than of integers
        block = (before <= rank[:, None]).sum(1) - 1
        places = self._starts[block][:, None] + np.arange(self._step)
        owners = self._owners[places.clip(max=len(self._values) - 1)]
        seen = before[rows, block][:, None] + np.cumsum(counts[rows[:, None], owners], axis=1)
        found: Array = self._values[(places[:, 0] + (seen <= rank[:, None]).sum(1)).clip(max=len(self._values) - 1)]
        return found


def interval(
    statistic: Statistic, strata: Sequence[int], within: Interval = (-math.inf, math.inf), level: float = LEVEL
) -> Interval | None:
    """Of a figure of windows, of which each prompt set has so many; they count on from set to set. No value is beyond `within`.

    None where there is one window, which tells nothing of others, or where a figure of a resample is not finite.
    """
    strata = [size for size in strata if size]
    if min(strata, default=0) < 2:
        strata = [sum(strata)]  # one window cannot be drawn anew by itself
    if strata[0] < 2:
        return None
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of scipy, where all resamples agree: seen below
        found = stats.bootstrap(
            _places(strata), _of_places(statistic, sum(strata)), vectorized=True, axis=-1, n_resamples=RESAMPLES,
            batch=BATCH, confidence_level=_level(strata, level), method="BCa", random_state=np.random.default_rng(SEED),
        )  # fmt: skip
    drawn = found.bootstrap_distribution
    if not np.isfinite(drawn).all():
        return None
    low, high = (float(edge) for edge in found.confidence_interval)
    if not np.isfinite([low, high]).all():  # no skew can be told, as where all windows agree
        low, high = (float(edge) for edge in np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]))
    if sum(strata) < FEW:
        low, high = _at_least_of_student(statistic, strata, level, (low, high))
    return max(low, within[0]), min(high, within[1])


def _at_least_of_student(statistic: Statistic, strata: Sequence[int], level: float, found: Interval) -> Interval:
    windows = sum(strata)
    without_each = np.split(statistic(1 - np.eye(windows, dtype=np.int64)), np.cumsum(strata)[:-1])
    error = math.sqrt(sum((len(of) - 1) * of.var() for of in without_each))
    reach, centre = float(stats.t.ppf((1 + level) / 2, windows - len(strata))) * error, value(statistic, windows)
    return min(found[0], centre - reach), max(found[1], centre + reach)


def of_no_change(trials: int) -> Interval:
    """Of a difference of rates where none of the pairs differed, which drawing them anew would take for certainty: as many may
    differ as binomially show none among so many (Clopper and Pearson), one way or the other. It narrows with the trials
    themselves, not with their root."""
    most = float(stats.binomtest(0, trials).proportion_ci(LEVEL, "exact").high)
    return -most, most


def mcnemar(only_baseline: int, only_candidate: int) -> float:
    """The exact two-sided p-value of pairs that only one of the two got right: how often a fair coin would be as one-sided."""
    flips = only_baseline + only_candidate
    return float(stats.binomtest(only_candidate, flips, 0.5).pvalue) if flips else 1.0


def _places(strata: Sequence[int]) -> tuple[Array, ...]:
    """The windows of each set by their place among all."""
    return tuple(np.split(np.arange(sum(strata)), np.cumsum(strata)[:-1]))


def _of_places(statistic: Statistic, windows: int) -> Callable[..., Array]:
    """The statistic of windows drawn by place, [..., n] of each set, as scipy draws them."""

    def figure(*drawn: Array, axis: int = -1) -> Array:
        shape = np.broadcast_shapes(*(places.shape[:-1] for places in drawn))
        places = np.concatenate([np.broadcast_to(p, (*shape, p.shape[-1])) for p in drawn], axis=-1)
        rows = places.reshape(-1, places.shape[-1])
        flat = (rows + windows * np.arange(len(rows))[:, None]).ravel()
        counts = np.bincount(flat, minlength=len(rows) * windows).reshape(len(rows), windows)
        return statistic(counts).reshape(shape)

    return figure


def _level(strata: Sequence[int], level: float) -> float:
    windows, free = sum(strata), sum(strata) - len(strata)
    reach = stats.t.ppf((1 + level) / 2, free) * np.sqrt(windows / free)
    return float(1 - 2 * stats.norm.sf(reach))
