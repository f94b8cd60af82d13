"""Recall questions: which ones baseline and candidate answer exactly, in all and by distance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from compress.check import figures, statistics
from compress.check.figures import Figure
from compress.prompts import PromptSet
from compress.prompts.questions import Question


class RecallFacts(TypedDict):
    """Of the questions that are `first` to `last` tokens of filler away from their facts. `low` and `high` are of `drop`."""

    artifact: str
    phase: str
    first: int
    last: int
    trials: int
    baseline_accuracy: float
    candidate_accuracy: float
    drop: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Answer:
    """Whether the most likely token was the answer."""

    question: Question
    baseline: bool
    candidate: bool


class Marks:
    """Marks the answers to a set's questions as the logits of its windows come by, in any order."""

    def __init__(self, prompts: PromptSet):
        self._windows = prompts.windows
        self._asked = {(question.window, question.position): question for question in prompts.questions}
        self._answers: list[Answer] = []

    def hear(self, window: int, start: int, log_p: torch.Tensor, logits_q: torch.Tensor) -> None:
        """Both [n, V]; row i predicts token `start` + i + 1 of the window."""
        if not self._asked:
            return
        for place in range(len(logits_q)):
            question = self._asked.get((window, start + place + 1))
            if question is not None:
                answer = int(self._windows[window][question.position])
                right = (int(rows[place].argmax()) == answer for rows in (log_p, logits_q))
                self._answers.append(Answer(question, *right))

    def answers(self) -> list[Answer]:
        """In the order of the text."""
        return sorted(self._answers, key=lambda answer: (answer.question.window, answer.question.position))


def drop(sets: Sequence[Sequence[Answer]]) -> Figure | None:
    """How much of the baseline's exact-match rate the candidate lost; None where nothing was asked."""
    sets = [answers for answers in sets if answers]
    if not sets:
        return None
    windows = [_by_window(answers) for answers in sets]
    lost, trials = np.concatenate([of_set[0] for of_set in windows]), np.concatenate([of_set[1] for of_set in windows])
    has_changed = any(answer.baseline != answer.candidate for answers in sets for answer in answers)
    return figures.drop(lost, trials, [len(of_set[0]) for of_set in windows], has_changed=has_changed)


def by_distance(artifact: str, phase: str, sets: Sequence[Sequence[Answer]]) -> list[RecallFacts]:
    """A row for each distance that questions were made for, or for each range of them."""
    distances = sorted({answer.question.distance for answers in sets for answer in answers})
    return [_row(artifact, phase, sets, distance) for distance in distances]


def _row(artifact: str, phase: str, sets: Sequence[Sequence[Answer]], distance: tuple[int, int]) -> RecallFacts:
    chosen = [[answer for answer in answers if answer.question.distance == distance] for answers in sets]
    found, together = drop(chosen), [answer for answers in chosen for answer in answers]
    assert found is not None  # the distance is that of some question
    low, high = found.interval or (None, None)
    return {
        "artifact": artifact,
        "phase": phase,
        "first": distance[0],
        "last": distance[1],
        "trials": found.positions,
        "baseline_accuracy": float(np.mean([answer.baseline for answer in together])),
        "candidate_accuracy": float(np.mean([answer.candidate for answer in together])),
        "drop": found.value,
        "low": low,
        "high": high,
    }


def _by_window(answers: Sequence[Answer]) -> tuple[statistics.Array, statistics.Array]:
    """How many answers each window lost, and how many questions it has, [W] each."""
    windows = sorted({answer.question.window for answer in answers})
    place = {window: i for i, window in enumerate(windows)}
    lost, trials = np.zeros(len(windows)), np.zeros(len(windows), int)
    for answer in answers:
        lost[place[answer.question.window]] += int(answer.baseline) - int(answer.candidate)
        trials[place[answer.question.window]] += 1
    return lost, trials
