"""Intervals of a check's figures: whether they cover what they say they do, and what they say where nothing can be told."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from compress.check import figures, statistics
from compress.check.compare import Row
from compress.check.metrics import STATISTICS, Scores

SIMULATED = 250
# of 250 intervals that cover with 95 %, fewer than 228 do so once in 1,000 simulations
FEWEST = int(stats.binom.ppf(0.001, SIMULATED, 0.95))


def random_windows(seed: int, *lengths: int) -> list[Scores]:
    """Positions of one window have something in common, as text has."""
    rng = np.random.default_rng(seed)

    def window(length: int) -> Scores:
        common, baseline = rng.gamma(4, 0.25), rng.gamma(2, 1, length)
        kl = common * rng.gamma(0.5, 0.01, length)
        hits = (rng.random(length) > share for share in (common / 20, 0.5, 0.55))
        return Scores(baseline, baseline + rng.normal(0, kl + 0.01), kl, kl * rng.gamma(9, 0.1, length), *hits)

    return [window(length) for length in lengths]


def covered(statistic_of, draw, truth: float, windows: int) -> int:
    found = [statistics.interval(statistic_of(draw()), [windows]) for _ in range(SIMULATED)]
    return sum(low <= truth <= high for low, high in found)


@pytest.mark.parametrize("windows", [2, 3, 5, 12, 40])
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


def test_few_windows_have_no_narrower_an_interval_than_students():
    """Two windows of 0.9 and 1.1 tell as good as nothing of others."""
    values = np.array([0.9, 1.1])
    expected = stats.t.interval(0.95, 1, values.mean(), stats.sem(values))
    assert statistics.interval(statistics.ratio(values, np.ones(2)), [2]) == pytest.approx(expected)
    windows = [Scores(*np.ones((4, 10)), np.arange(10) < share, *np.ones((2, 10), bool)) for share in (6, 9)]
    assert figures.of("top1_agreement", [windows]).interval == (0, 1), "no share is below 0 or above 1"


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


def by_numpy(scores: Scores) -> dict[str, float]:
    """The metrics from their definitions."""
    kl = scores.kl_divergence
    percentiles = {name: np.percentile(kl, percent) for name, percent in
                   (("p50", 50), ("p95", 95), ("p99", 99), ("p999", 99.9))}  # fmt: skip
    return {
        "perplexity_ratio": np.exp(scores.nll_candidate.mean()) / np.exp(scores.nll_baseline.mean()),
        "kl_divergence_mean": kl.mean(),
        "kl_divergence_reverse_mean": scores.kl_reverse.mean(),
        **{f"kl_divergence_{name}": value for name, value in percentiles.items()},
        "kl_divergence_tail_ratio": percentiles["p99"] / kl.mean(),
        "top1_agreement": scores.same_top1.mean(),
        "top1_accuracy_drop": scores.baseline_right.mean() - scores.candidate_right.mean(),
    }


def test_statistics_of_windows_are_the_metrics_of_what_was_drawn():
    windows = random_windows(1, 40, 70, 5, 300)
    counts = np.array([[1, 1, 1, 1], [4, 0, 0, 0], [0, 2, 1, 1], [0, 0, 4, 0], [0, 0, 1, 3]])
    for metric, statistic_of in STATISTICS.items():
        found = statistic_of(windows)(counts)
        for row, value in zip(counts, found, strict=True):
            drawn = [window for window, times in zip(windows, row, strict=True) for _ in range(times)]
            expected = by_numpy(Scores.concatenate(drawn))[metric]
            assert value == pytest.approx(expected, rel=1e-12, abs=1e-15), (metric, row)  # sums in another order


@pytest.mark.parametrize("percent", [0, 0.1, 37.5, 50, 99, 99.9, 100])
@pytest.mark.parametrize("lengths", [(1,), (3, 1), (40, 70, 5, 300), (200,) * 30])
def test_percentiles_are_numpys_of_ties_too(percent, lengths):
    rng = np.random.default_rng(len(lengths))
    windows = [rng.integers(0, 50, length) / 7 for length in lengths]
    counts = rng.multinomial(len(lengths), np.full(len(lengths), 1 / len(lengths)), 20)
    found = statistics.percentile(windows, percent)(counts)
    for row, value in zip(counts, found, strict=True):
        drawn = np.concatenate([window for window, times in zip(windows, row, strict=True) for _ in range(times)])
        assert value == pytest.approx(np.percentile(drawn, percent), rel=1e-12, abs=1e-12)


def test_a_percentile_hides_no_value_that_is_no_number():
    windows = [np.ones(500), np.append(np.ones(499), np.nan)]
    assert np.isnan(statistics.percentile(windows, 50)(np.ones((1, 2), int))).all()


@pytest.mark.filterwarnings("error")
def test_nothing_that_differs_has_a_tail_like_everything_that_differs_alike():
    for kl in (np.zeros(40), np.full(40, 0.25)):
        ones = np.ones(40)
        figure = figures.of("kl_divergence_tail_ratio", [[Scores(ones, ones, kl, kl, *[ones > 0] * 3)] * 3])
        assert (figure.value, figure.interval) == (pytest.approx(1), pytest.approx((1, 1)))


@pytest.mark.parametrize("metric", list(STATISTICS))
def test_a_figure_has_the_value_of_all_positions_and_an_interval_around_it(metric):
    sets = [random_windows(1, *[60] * 8), random_windows(2, *[40] * 6)]
    figure = figures.of(metric, sets)
    assert figure.value == pytest.approx(by_numpy(Scores.concatenate([*sets[0], *sets[1]]))[metric], rel=1e-12)
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
def test_a_figure_that_only_some_resamples_have_finite_has_no_interval_and_says_why():
    windows = random_windows(1, *[60] * 3)
    windows[1].nll_candidate[:] += 1500  # e^500 is a number, e^1500 is none
    figure = figures.of("perplexity_ratio", [windows])
    assert np.isfinite(figure.value)
    assert figure.interval is None
    assert "worst_prompts" in figure.note
    row = Row("it", "perplexity_ratio", "decode", "all", figure.value, 180, figure.value * 2, note=figure.note)
    assert row.outcome == "undecided"


@pytest.mark.filterwarnings("error")
def test_windows_that_agree_leave_no_doubt():
    same = np.full(5, 0.25)
    assert statistics.interval(statistics.ratio(same, np.ones(5)), [5]) == (0.25, 0.25)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (0, 6), (3, 3), (12, 4), (4, 12), (400, 300)])
def test_mcnemar_is_the_sum_of_the_tails_of_a_fair_coin(lost, gained):
    flips = lost + gained
    tail = sum(math.comb(flips, k) for k in range(min(lost, gained) + 1))
    assert statistics.mcnemar(lost, gained) == pytest.approx(float(min(1, Fraction(2 * tail, 2**flips))), rel=1e-12)
