"""Baseline against candidate over prompt sets: rows of the report, and whether every limit held."""

import math
from dataclasses import dataclass, field, fields
from typing import Literal, NotRequired, TypedDict

import torch

from compress.check import positions, recall, standing, tasks, worst
from compress.check.audit import AuditFacts
from compress.check.baseline import Baseline
from compress.check.figures import Figure
from compress.check.flips import FlipFacts, flips
from compress.check.generated import GeneratedFacts
from compress.check.layer_audit import LayerAuditFacts
from compress.check.metrics import Scores, WindowScores, score
from compress.check.outcomes import Outcome, more_tokens, outcome
from compress.check.positions import PositionFacts
from compress.check.recall import Marks, RecallFacts
from compress.check.scored import Scored, told
from compress.check.standing import OnTask, OnText
from compress.check.states import HealthFacts, SaturationFacts
from compress.check.statistics import Interval
from compress.check.tasks import Answered, TaskFacts
from compress.check.worst import WorstFacts
from compress.disk.paths import as_text
from compress.prompts import PromptSet
from compress.recipe.check import METRICS, PHASES, MetricName
from compress.runtime.candidates import Candidate
from compress.strict.json_text import finite
from compress.terminal import progress

ALL = "all"
OF_TASKS: MetricName = "task_accuracy_drop"
Verdict = Literal["pass", "fail", "undecided", "not_checked"]


def stage(artifact: str, phase: str, prompt_set: str) -> str:
    """What the progress of scoring is shown under."""
    return f"{artifact}: {phase} on {as_text(prompt_set)}"


class RowFacts(TypedDict):
    """A row as JSON has it: without a value where it is not finite, or where nothing could be measured (`positions` is 0).
    `more_tokens` is about how much more text would settle what is undecided; None where no amount would, or where it cannot
    be told."""

    artifact: str
    metric: MetricName
    phase: str
    prompts: str
    value: float | None
    low: float | None
    high: float | None
    positions: int
    limit: float | None
    outcome: Outcome | None
    passed: bool | None
    more_tokens: int | None
    note: NotRequired[str]


@dataclass(frozen=True)
class Row:
    """One line of the report's `checks`. Rows over all prompts carry a limit where the recipe gives one. `value` is None where
    a limit asks for what the prompts cannot tell; `note` says why, or why there is no interval. The figure is of `tokens` tokens
    of text, and its interval narrows as a Figure's."""

    artifact: str
    metric: MetricName
    phase: str
    prompts: str
    value: float | None
    positions: int
    limit: float | None = None
    low: float | None = None
    high: float | None = None
    note: str | None = None
    tokens: int = 0
    narrowing: float = 0.5

    @property
    def interval(self) -> Interval | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def outcome(self) -> Outcome | None:
        """None where there is no limit, or nothing to compare with it."""
        if self.limit is None or self.value is None:
            return None
        return outcome(self.metric, self.limit, self.value, self.interval)

    @property
    def passed(self) -> bool | None:
        return None if self.outcome is None else self.outcome == "held"

    @property
    def more_tokens(self) -> int | None:
        if self.outcome != "undecided" or self.limit is None or self.value is None:
            return None
        return more_tokens(self.limit, self.value, self.interval, self.tokens, self.narrowing)

    @property
    def is_finite(self) -> bool:
        return self.value is None or math.isfinite(self.value)

    def to_json(self) -> RowFacts:
        """`value` is None where it is not a number."""
        found: RowFacts = {
            "artifact": self.artifact,
            "metric": self.metric,
            "phase": self.phase,
            "prompts": self.prompts,
            "value": finite(self.value),
            "low": self.low,
            "high": self.high,
            "positions": self.positions,
            "limit": self.limit,
            "outcome": self.outcome,
            "passed": self.passed,
            "more_tokens": self.more_tokens,
        }
        if self.note is not None:
            found["note"] = self.note
        return found


class FoundFacts(TypedDict):
    """What report.json and `check --json` have of a check."""

    remarks: list[str]
    checks: list[RowFacts]
    audit: list[AuditFacts]
    layer_audit: list[LayerAuditFacts]
    flips: list[FlipFacts]
    worst_prompts: list[WorstFacts]
    tasks: list[TaskFacts]
    by_position: list[PositionFacts]
    recall: list[RecallFacts]
    state_health: list[HealthFacts]
    state_saturation: list[SaturationFacts]
    generated: list[GeneratedFacts]


@dataclass
class Found:
    """What a check found: rows with their limits, what the audit says of tensors and layers, the same figures by position and
    by distance, what states and generated texts look like. `remarks` are sentences on whether to believe it. `text` and
    `answered` are sums that a later check is paired with; they are no part of a report."""

    rows: list[Row] = field(default_factory=list)
    audit: list[AuditFacts] = field(default_factory=list)
    layer_audit: list[LayerAuditFacts] = field(default_factory=list)
    flips: list[FlipFacts] = field(default_factory=list)
    worst_prompts: list[WorstFacts] = field(default_factory=list)
    tasks: list[TaskFacts] = field(default_factory=list)
    by_position: list[PositionFacts] = field(default_factory=list)
    recall: list[RecallFacts] = field(default_factory=list)
    state_health: list[HealthFacts] = field(default_factory=list)
    state_saturation: list[SaturationFacts] = field(default_factory=list)
    generated: list[GeneratedFacts] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    text: list[OnText] = field(default_factory=list)
    answered: list[OnTask] = field(default_factory=list)

    def add(self, other: "Found") -> None:
        for part in fields(self):
            getattr(self, part.name).extend(getattr(other, part.name))

    def facts(self) -> FoundFacts:
        return {
            "remarks": self.remarks,
            "checks": [row.to_json() for row in self.rows],
            "audit": self.audit,
            "layer_audit": self.layer_audit,
            "flips": self.flips,
            "worst_prompts": self.worst_prompts,
            "tasks": self.tasks,
            "by_position": self.by_position,
            "recall": self.recall,
            "state_health": self.state_health,
            "state_saturation": self.state_saturation,
            "generated": self.generated,
        }


def compare(
    artifact: str, candidate: Candidate, sets: list[tuple[PromptSet, Baseline]], limits: dict[MetricName, float]
) -> Found:
    """Scores one artifact in both phases. Limits bind the rows over all prompts; rows per set inform."""
    found, prefilled = Found(), dict[str, Scored]()
    for phase in PHASES:
        by_set = {prompts.name: scored(artifact, candidate, prompts, baseline, phase) for prompts, baseline in sets}
        prefilled = prefilled or by_set
        together = list(by_set.values())
        found.rows += _rows(artifact, phase, ALL, told(phase, together, list(prefilled.values())), together, limits)
        found.flips.append(flips(artifact, phase, ALL, [window for one in together for window in one.scores]))
        for name, one in by_set.items():
            found.rows += _rows(artifact, phase, name, told(phase, [one], [prefilled[name]]), [one], {})
            found.flips.append(flips(artifact, phase, name, one.scores))
            found.text += one.sums(artifact, phase)
        found.by_position += positions.by_position(artifact, phase, [one.scores for one in together])
        found.recall += recall.by_distance(artifact, phase, [one.answers for one in together])
        found.worst_prompts = worst.find(artifact, phase, together)  # of the last phase: what decoding hands on counts
    return found


def of_tasks(artifact: str, answered: list[Answered], limits: dict[MetricName, float]) -> Found:
    """What the tasks tell of an artifact: a row over all of them, which the limit binds, and one for each."""
    found, limit = Found(), limits.get(OF_TASKS)
    if answered:
        tokens = sum(one.task.tokens for one in answered)
        found.rows.append(_row(artifact, OF_TASKS, tasks.PHASE, ALL, tasks.drop(answered), limit, tokens))
    elif limit is not None:
        found.rows.append(_unmeasured(artifact, OF_TASKS, tasks.PHASE, ALL, limit))
    for one in answered:
        found.tasks += tasks.facts(artifact, one)
        found.answered += [standing.of_task(None, one, "baseline"), standing.of_task(artifact, one, "candidate")]
    return found


def verdict(found: Found) -> Verdict:
    """`fail` where a limit was missed, a metric is not a number, or the audit found something; else
    `undecided` where a limit is, else `pass`; `not_checked` where there was no limit, or one that nothing could be compared
    with."""
    outcomes = [row.outcome for row in found.rows if row.limit is not None]
    is_damaged = not all(row["passed"] for row in (*found.audit, *found.layer_audit))
    if is_damaged or "missed" in outcomes or not all(row.is_finite for row in found.rows):
        return "fail"
    if "undecided" in outcomes:
        return "undecided"
    return "pass" if outcomes and None not in outcomes else "not_checked"


def _rows(artifact: str, phase: str, prompts: str, figures: dict[MetricName, Figure], sets: list[Scored],
          limits: dict[MetricName, float]) -> list[Row]:  # fmt: skip
    """In the order of the metrics; one that a limit asks for has a row also where nothing tells it."""
    found = []
    for metric in METRICS:
        limit = limits.get(metric) if phase in METRICS[metric].phases else None
        if metric in figures:
            tokens = sum(scored.tokens(metric) for scored in sets)
            found.append(_row(artifact, metric, phase, prompts, figures[metric], limit, tokens))
        elif limit is not None and metric != OF_TASKS:
            found.append(_unmeasured(artifact, metric, phase, prompts, limit))
    return found


def _unmeasured(artifact: str, metric: MetricName, phase: str, prompts: str, limit: float) -> Row:
    return Row(artifact, metric, phase, prompts, None, 0, limit, note=METRICS[metric].unmeasured)


def _row(artifact: str, metric: MetricName, phase: str, prompts: str, figure: Figure, limit: float | None,
         tokens: int) -> Row:  # fmt: skip
    low, high = figure.interval or (None, None)
    return Row(artifact, metric, phase, prompts, figure.value, figure.positions, limit, low, high, figure.note, tokens,
               figure.narrowing)  # fmt: skip


def scored(artifact: str, candidate: Candidate, prompts: PromptSet, baseline: Baseline, phase: str) -> Scored:
    """An artifact on one prompt set, beside the baseline."""
    pieces: dict[int, dict[int, Scores]] = {}
    marks = Marks(prompts)
    with progress.task(stage(artifact, phase, prompts.name), candidate.steps(prompts.tokens)) as advance:
        for window, start, logits in candidate.logits(prompts.windows, phase, advance):
            stop = start + len(logits)
            targets = prompts.windows[window][start + 1 : stop + 1]
            with torch.inference_mode():
                log_p = baseline.log_probs(window, start, stop)
                pieces.setdefault(window, {})[start] = score(log_p, logits, targets)
                marks.hear(window, start, log_p, logits)
    answers = marks.answers()
    asked = sum(len(prompts.windows[window]) for window in {answer.question.window for answer in answers})
    return Scored(prompts, {window: _in_order(pieces[window]) for window in sorted(pieces)}, answers, asked)


def _in_order(pieces: dict[int, Scores]) -> WindowScores:
    """Of one window, whose pieces came by their first position."""
    return WindowScores(min(pieces) + 1, Scores.concatenate([pieces[start] for start in sorted(pieces)]))
