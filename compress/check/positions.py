"""Figures by position in the window: whether an error grows with what was read before."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from compress.check import figures
from compress.check.metrics import Scores, WindowScores
from compress.prompts.questions import buckets
from compress.strict.json_text import finite


class PositionFacts(TypedDict):
    """Of the tokens `first` to `last` of every window. `low` and `high` are of the divergence. None is not finite."""

    artifact: str
    phase: str
    first: int
    last: int
    positions: int
    kl_divergence_mean: float | None
    low: float | None
    high: float | None
    baseline_perplexity: float | None
    candidate_perplexity: float | None


def between(sets: Sequence[Sequence[WindowScores]], first: int, last: float) -> list[list[Scores]]:
    """The scores of these tokens, of windows that have some, by prompt set."""
    cut = [[window.between(first, last) for window in of_set] for of_set in sets]
    return [[scores for scores in of_set if len(scores)] for of_set in cut]


def by_position(artifact: str, phase: str, sets: Sequence[Sequence[WindowScores]]) -> list[PositionFacts]:
    """A row for each bucket of positions that was scored, over all prompt sets."""
    longest = max(window.tokens - 1 for of_set in sets for window in of_set)
    found = [(bucket, between(sets, *bucket)) for bucket in buckets(longest)]
    return [_row(artifact, phase, *bucket, scores) for bucket, scores in found if any(scores)]


def _row(artifact: str, phase: str, first: int, last: int, sets: list[list[Scores]]) -> PositionFacts:
    figure = figures.of("kl_divergence_mean", sets)
    together = Scores.concatenate([scores for of_set in sets for scores in of_set])
    low, high = figure.interval or (None, None)
    return {
        "artifact": artifact,
        "phase": phase,
        "first": first,
        "last": last,
        "positions": figure.positions,
        "kl_divergence_mean": finite(figure.value),
        "low": low,
        "high": high,
        "baseline_perplexity": _perplexity(together.nll_baseline),
        "candidate_perplexity": _perplexity(together.nll_candidate),
    }


def _perplexity(nll: np.ndarray) -> float | None:
    with np.errstate(over="ignore", invalid="ignore"):
        return finite(float(np.exp(nll.mean())))
