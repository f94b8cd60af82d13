"""Multiple choice and cloze from a .jsonl file: which items baseline and candidate answer rightly.

Of the choices that one is taken whose tokens are the most probable after the question: the largest sum of log-probabilities,
which is `acc` of the lm-evaluation-harness. A cloze is right where every token of the answer is the most likely one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
import torch

from compress.check import carried, figures, statistics
from compress.check.figures import Figure
from compress.check.statistics import Array
from compress.disk import cache
from compress.prompts.task_files import Item, Kind, Option, Task
from compress.runtime.candidates import Candidate
from compress.terminal import progress

BASELINE = "baseline"
VERSION = 1  # part of the key: raise it when our forward changes its values
PHASE = "prefill"  # in which items are scored


class TaskFacts(TypedDict):
    """`low` and `high` are of `change`, the candidate's accuracy minus the baseline's; `p_value` is McNemar's, exact."""

    artifact: str
    task: str
    kind: Kind
    items: int
    baseline_accuracy: float
    candidate_accuracy: float
    change: float
    low: float | None
    high: float | None
    only_baseline: int
    only_candidate: int
    p_value: float


@dataclass(frozen=True)
class Answered:
    """A task, and which of its items baseline and candidate answered rightly, [items] each."""

    task: Task
    baseline: Array
    candidate: Array

    def of_kind(self, kind: Kind) -> "Answered":
        chosen = np.array([item.kind == kind for item in self.task.items])
        items = tuple(item for item in self.task.items if item.kind == kind)
        return Answered(Task(self.task.name, items), self.baseline[chosen], self.candidate[chosen])


def stage(artifact: str, task: str) -> str:
    """What the progress of answering is shown under."""
    return f"{artifact}: tasks {task}"


def of_baseline(reference: Candidate, model_sha256: str, task: Task) -> Array:
    """Which items the original answers rightly, from the cache where that is there."""
    cache.folder("tasks")

    def write(file: BinaryIO) -> None:
        np.save(file, right(BASELINE, reference, task))

    asked = carried.asking_for(f"answers to the tasks '{task.name}' as they read here")
    with asked, cache.entry(_path(model_sha256, task), write) as file:
        return np.asarray(np.load(file))


def _path(model_sha256: str, task: Task) -> Path:
    key = hashlib.sha256(f"{VERSION}/{model_sha256}/{task.digest()}".encode()).hexdigest()[:32]
    return cache.location("tasks") / f"{key}.npy"


def right(artifact: str, candidate: Candidate, task: Task) -> Array:
    """Whether each item is answered rightly, [items]."""
    log_probs, is_greedy = _options(artifact, candidate, task)
    stops = np.cumsum([len(item.options) for item in task.items])
    places = [slice(stop - len(item.options), stop) for stop, item in zip(stops, task.items, strict=True)]
    marks = [
        _is_right(item, log_probs[place], is_greedy[place]) for item, place in zip(task.items, places, strict=True)
    ]
    return np.array(marks, bool)


def _is_right(item: Item, log_probs: Array, is_greedy: Array) -> bool:
    """No figure that is not a number answers anything."""
    if item.kind == "cloze":
        return bool(is_greedy.all())
    return bool(np.isfinite(log_probs).all() and log_probs.argmax() == item.answer)


def _options(artifact: str, candidate: Candidate, task: Task) -> tuple[Array, Array]:
    """Of every option the sum of its tokens' log-probabilities (nats), and whether each was the most likely one, [options]."""
    options = sorted(enumerate(task.options), key=lambda placed: len(placed[1].ids))  # equal lengths run together
    log_probs, is_greedy = np.zeros(len(options)), np.ones(len(options), bool)
    total = candidate.steps(task.tokens)
    with progress.task(stage(artifact, task.name), total) as advance, torch.inference_mode():
        for window, start, logits in candidate.logits([option.ids for _, option in options], PHASE, advance):
            place, option = options[window]
            log_prob, greedy = _piece(option, start, logits)
            log_probs[place] += log_prob
            is_greedy[place] &= greedy
    return log_probs, is_greedy


def _piece(option: Option, start: int, logits: torch.Tensor) -> tuple[float, bool]:
    """Of those tokens of the continuation that these logits [n, V] predict: row i is of token `start` + i + 1."""
    skipped = max(0, option.first - start - 1)
    tokens = option.ids[start + 1 + skipped : start + 1 + len(logits)]
    log_q = torch.log_softmax(logits[skipped:].float(), dim=-1)
    found = log_q.gather(1, tokens[:, None]).double().sum()
    return float(found), bool((log_q.argmax(-1) == tokens).all())


def facts(artifact: str, answered: Answered) -> list[TaskFacts]:
    """A row for each kind of item in the file."""
    kinds = dict.fromkeys(item.kind for item in answered.task.items)
    return [_row(artifact, kind, answered.of_kind(kind)) for kind in kinds]


def _row(artifact: str, kind: Kind, answered: Answered) -> TaskFacts:
    before, after, figure = answered.baseline, answered.candidate, drop([answered])
    low, high = figure.interval or (None, None)
    only = int((before & ~after).sum()), int((after & ~before).sum())
    return {
        "artifact": artifact,
        "task": answered.task.name,
        "kind": kind,
        "items": len(before),
        "baseline_accuracy": float(before.mean()),
        "candidate_accuracy": float(after.mean()),
        "change": float(after.mean() - before.mean()),
        "low": None if high is None else -high,
        "high": None if low is None else -low,
        "only_baseline": only[0],
        "only_candidate": only[1],
        "p_value": statistics.mcnemar(*only),
    }


def drop(answered: Sequence[Answered]) -> Figure:
    """`task_accuracy_drop`, over the items of all tasks, of which there are some. Items are drawn anew, those of each task."""
    lost = np.concatenate([one.baseline.astype(float) - one.candidate for one in answered])
    return figures.drop(
        lost, np.ones(len(lost), int), [len(one.baseline) for one in answered], has_changed=bool(lost.any())
    )
