"""What one phase scored of prompt sets, and every metric of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.check import figures, positions, recall, standing
from compress.check.figures import Figure
from compress.check.metrics import STATISTICS, WindowScores, root_mean_square
from compress.check.recall import Answer
from compress.check.standing import OnText, Place
from compress.prompts import PromptSet
from compress.recipe.check import DRIFT_FROM, METRICS, MetricName, Phase


@dataclass(frozen=True)
class Scored:
    """One phase over one prompt set, its windows by their place in it; those without a scored position are left out.
    Questions were asked in windows of `asked` tokens together."""

    prompts: PromptSet
    windows: dict[int, WindowScores]
    answers: list[Answer]
    asked: int

    @property
    def scores(self) -> list[WindowScores]:
        return list(self.windows.values())

    def tokens(self, metric: MetricName) -> int:
        """Of the text that a metric looks at."""
        if metric == "recall_accuracy_drop":
            return self.asked
        first = DRIFT_FROM if metric == "decode_drift_ratio" else 0
        return sum(window.tokens for window in self.scores if window.tokens > first)

    def sums(self, artifact: str, phase: Phase) -> list[OnText]:
        """The baseline's, then the artifact's."""
        places = Place(None, self.prompts, phase), Place(artifact, self.prompts, phase)
        return [
            standing.of_baseline(places[0], self.scores, self.answers),
            standing.of_candidate(places[1], self.scores, self.answers),
        ]


def told(phase: str, sets: Sequence[Scored], prefilled: Sequence[Scored]) -> dict[MetricName, Figure]:
    """Figures of every metric that the phase and the prompts tell; `prefilled` are the same sets in prefill."""
    windows = [scored.scores for scored in sets]
    found = {metric: figures.of(metric, [[w.scores for w in of_set] for of_set in windows]) for metric in STATISTICS}
    late = positions.between(windows, DRIFT_FROM, math.inf)
    if any(late) and phase in METRICS["decode_drift_ratio"].phases:
        found["decode_drift_ratio"] = figures.of("perplexity_ratio", late)
    if phase in METRICS["decode_prefill_difference"].phases:
        found["decode_prefill_difference"] = _difference(sets, prefilled)
    if lost := recall.drop([scored.answers for scored in sets]):
        found["recall_accuracy_drop"] = lost
    return found


def _difference(sets: Sequence[Scored], prefilled: Sequence[Scored]) -> Figure:
    """Of the candidate's log-probabilities of the text's tokens, in the positions that were decoded."""
    changes = [
        window.scores.nll_candidate - before.windows[place].between(window.first, math.inf).nll_candidate
        for scored, before in zip(sets, prefilled, strict=True)
        for place, window in scored.windows.items()
    ]
    strata = [len(scored.windows) for scored in sets]
    return figures.figure(root_mean_square(changes), strata, sum(map(len, changes)))
