"""Intervals of a check's figures: whether they cover what they say they do, and what they say where nothing can be told."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from compress.check import figures, statistics
from compress.check.metrics import STATISTICS, Scores, summarize

SIMULATED = 250
# of 250 intervals that cover with 95 %, fewer than 228 do so once in 1,000 simulations
FEWEST = int(stats.binom.ppf(0.001, SIMULATED, 0.95))


def scores(kl: np.ndarray, baseline: np.ndarray, candidate: np.ndarray, same: np.ndarray) -> Scores:
    return Scores(baseline, candidate, kl, same, same, same)


def random_windows(seed: int, *lengths: int) -> list[Scores]:
    """Positions of one window have something in common, as text has."""
    rng = np.random.default_rng(seed)

    def window(length: int) -> Scores:
        common, baseline = rng.gamma(4, 0.25), rng.gamma(2, 1, length)
        kl = common * rng.gamma(0.5, 0.01, length)
        return scores(kl, baseline, baseline + rng.normal(0, kl + 0.01), rng.random(length) > common / 20)

    return [window(length) for length in lengths]


def covered(statistic_of, draw, truth: float, windows: int) -> int:
    found = [statistics.interval(statistic_of(draw()), [windows]) for _ in range(SIMULATED)]
    return sum(low <= truth <= high for low, high in found)


@pytest.mark.parametrize("windows", [12, 40])
def test_the_interval_of_a_skewed_mean_covers_it_as_often_as_it_says(windows):
    rng = np.random.default_rng(windows)
    hits = covered(
        lambda sums: statistics.ratio(sums, np.full(windows, 100)), lambda: rng.gamma(4, 25, windows), 1.0, windows
    )
    assert hits >= FEWEST


def test_the_interval_of_a_perplexity_ratio_covers_it_as_often_as_it_says():
    """Windows are of several lengths, baseline and candidate are paired: what both find hard is no noise."""
    rng, lengths = np.random.default_rng(3), np.repeat([50, 100, 200], 8)

    def change() -> np.ndarray:
        return lengths * rng.normal(0.01, 0.02, len(lengths))

    statistic = lambda sums: statistics.exp(statistics.ratio(sums, lengths))  # noqa: E731
    assert covered(statistic, change, np.exp(0.01), len(lengths)) >= FEWEST


def test_an_interval_is_not_wider_than_it_must_be():
    """About that of Student's t, where that is right: windows of a normal distribution."""
    values = np.random.default_rng(0).normal(5, 2, 60)
    low, high = statistics.interval(statistics.ratio(values, np.ones(60)), [60])
    expected = stats.t.interval(0.95, 59, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))


def test_differences_between_prompt_sets_are_no_noise():
    """The share of each set is given: two sets far apart, each of one value almost, have a mean that is known well."""
    values = np.concatenate([np.linspace(0, 0.01, 20), np.linspace(9, 9.01, 20)])
    statistic = statistics.ratio(values, np.ones(40))
    low, high = statistics.interval(statistic, [20, 20])
    assert high - low < 0.01
    low, high = statistics.interval(statistic, [40])
    assert high - low > 1


def test_statistics_of_windows_are_the_metrics_of_what_was_drawn():
    windows = random_windows(1, 40, 70, 5, 300)
    counts = np.array([[1, 1, 1, 1], [4, 0, 0, 0], [0, 2, 1, 1], [0, 0, 4, 0], [0, 0, 1, 3]])
    for metric, statistic_of in STATISTICS.items():
        found = statistic_of(windows)(counts)
        for row, value in zip(counts, found, strict=True):
            drawn = [window for window, times in zip(windows, row, strict=True) for _ in range(times)]
            # sums in another order
            assert value == pytest.approx(summarize(Scores.concatenate(drawn))[metric], rel=1e-12), (metric, row)


@pytest.mark.parametrize("metric", list(STATISTICS))
def test_a_figure_has_the_value_of_all_positions_and_an_interval_around_it(metric):
    sets = [random_windows(1, *[60] * 8), random_windows(2, *[40] * 6)]
    figure = figures.of(metric, sets)
    assert figure.value == summarize(Scores.concatenate([*sets[0], *sets[1]]))[metric]
    assert figure.interval[0] < figure.value < figure.interval[1]
    assert (figure.positions, figure.windows) == (8 * 60 + 6 * 40, 14)
    assert figures.of(metric, sets) == figure, "the same windows have the same interval"


def test_one_window_tells_no_interval_and_says_so():
    figure = figures.of("kl_divergence_mean", [random_windows(1, 60)])
    assert figure.interval is None
    assert "single window" in figure.note


def test_a_set_of_one_window_beside_others_has_an_interval():
    figure = figures.of("kl_divergence_mean", [random_windows(1, *[60] * 5), random_windows(2, 60)])
    assert figure.interval[0] < figure.value < figure.interval[1]
    assert figure.note is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_figure_that_is_not_finite_has_no_interval(broken):
    windows = random_windows(1, *[60] * 4)
    windows[2].kl_divergence[7] = broken
    windows[2].nll_candidate[7] = broken
    for metric in ("perplexity_ratio", "kl_divergence_mean", "kl_divergence_p99"):
        assert figures.of(metric, [windows]).interval is None


@pytest.mark.filterwarnings("error")
def test_windows_that_agree_leave_no_doubt():
    same = np.full(5, 0.25)
    assert statistics.interval(statistics.ratio(same, np.ones(5)), [5]) == (0.25, 0.25)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (0, 6), (3, 3), (12, 4), (4, 12), (400, 300)])
def test_mcnemar_is_the_sum_of_the_tails_of_a_fair_coin(lost, gained):
    flips = lost + gained
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1))
    assert statistics.mcnemar(lost, gained) == pytest.approx(float(min(1, Fraction(2 * tail, 2**flips))), rel=1e-12)
