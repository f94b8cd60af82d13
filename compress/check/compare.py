"""Baseline against candidate over prompt sets: rows of the report, and whether every limit held."""

import math
from dataclasses import dataclass
from typing import TypedDict

import torch

from compress.check.baseline import Baseline
from compress.check.metrics import Scores, score, summarize
from compress.disk.paths import as_text
from compress.prompts import PromptSet
from compress.recipe.check import METRICS, PHASES, MetricName
from compress.runtime.candidates import Candidate
from compress.terminal import progress

ALL = "all"


def stage(artifact: str, phase: str, prompt_set: str) -> str:
    """What the progress of scoring is shown under."""
    return f"{artifact}: {phase} on {as_text(prompt_set)}"


class RowFacts(TypedDict):
    """A row as JSON has it."""

    artifact: str
    metric: MetricName
    phase: str
    prompts: str
    value: float | None
    positions: int
    limit: float | None
    passed: bool | None


@dataclass(frozen=True)
class Row:
    """One line of the report's `checks`. Rows over all prompts carry a limit where the recipe gives one."""

    artifact: str
    metric: MetricName
    phase: str
    prompts: str
    value: float
    positions: int
    limit: float | None = None

    @property
    def passed(self) -> bool | None:
        return None if self.limit is None else self.is_finite and METRICS[self.metric].holds(self.value, self.limit)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.value)

    def to_json(self) -> RowFacts:
        """`value` is None where it is not a number."""
        return {
            "artifact": self.artifact,
            "metric": self.metric,
            "phase": self.phase,
            "prompts": self.prompts,
            "value": self.value if self.is_finite else None,
            "positions": self.positions,
            "limit": self.limit,
            "passed": self.passed,
        }


def compare(
    artifact: str, candidate: Candidate, sets: list[tuple[PromptSet, Baseline]], limits: dict[MetricName, float]
) -> list[Row]:
    """Scores one artifact in both phases. Limits bind the rows over all prompts; rows per set inform."""
    rows = []
    for phase in PHASES:
        by_set = {prompts.name: _scores(artifact, candidate, prompts, baseline, phase) for prompts, baseline in sets}
        rows += _rows(artifact, phase, ALL, Scores.concatenate(list(by_set.values())), limits)
        for name, scores in by_set.items():
            rows += _rows(artifact, phase, name, scores, {})
    return rows


def verdict(rows: list[Row]) -> str:
    """`fail` where a limit was missed or a metric is not a number, else `pass`; `not_checked` where there was no limit."""
    if any(row.passed is False or not row.is_finite for row in rows):
        return "fail"
    return "pass" if any(row.passed for row in rows) else "not_checked"


def _rows(artifact: str, phase: str, prompts: str, scores: Scores, limits: dict[MetricName, float]) -> list[Row]:
    positions = len(scores.kl_divergence)
    return [
        Row(artifact, metric, phase, prompts, value, positions, limits.get(metric))
        for metric, value in summarize(scores).items()
    ]


def _scores(artifact: str, candidate: Candidate, prompts: PromptSet, baseline: Baseline, phase: str) -> Scores:
    """One phase over one prompt set, positions in the order of the windows."""
    pieces: dict[tuple[int, int], Scores] = {}
    with progress.task(stage(artifact, phase, prompts.name), candidate.steps(prompts.tokens)) as advance:
        for window, start, logits in candidate.logits(prompts.windows, phase, advance):
            stop = start + len(logits)
            targets = prompts.windows[window][start + 1 : stop + 1]
            with torch.inference_mode():
                pieces[window, start] = score(baseline.log_probs(window, start, stop), logits, targets)
    return Scores.concatenate([pieces[key] for key in sorted(pieces)])
