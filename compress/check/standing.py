"""How an artifact stands on a text by itself, window by window: what is kept of a check, so that a later one can be paired with
it. Sums of a window are enough, since windows are what is drawn anew."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import model_validator

from compress.check.metrics import WindowScores
from compress.check.recall import Answer
from compress.check.statistics import Array
from compress.prompts import PromptSet, digest
from compress.recipe.check import Phase
from compress.strict.json_text import finite
from compress.strict.models import Strict

if TYPE_CHECKING:
    from compress.check.tasks import Answered

Who = Literal["baseline", "candidate"]


class OnText(Strict):
    """Of one prompt set (`sha256` is of its tokens) in one phase, over the scored positions of each window: how many there are,
    the negative log-probability (nats) of the text's tokens, and at how many positions the text's token is the most likely
    one. Beside a baseline: the divergence from it (nats), and at how many positions both have the same most likely token.
    `answered` of `asked` recall questions are right, of each window with some. A sum that is no number is None; so is the
    artifact where these are a baseline's."""

    artifact: str | None
    prompts: str
    sha256: str
    phase: Phase
    positions: tuple[int, ...]
    nll: tuple[float | None, ...]
    right: tuple[int, ...]
    kl_divergence: tuple[float | None, ...] = ()
    same_top1: tuple[int, ...] = ()
    asked: tuple[int, ...] = ()
    answered: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _even(self) -> "OnText":
        beside = {len(sums) for sums in (self.kl_divergence, self.same_top1) if sums}
        if {len(self.nll), len(self.right), *beside} != {len(self.positions)} or len(self.asked) != len(self.answered):
            raise ValueError("expected as many sums as there are windows")
        if min(self.positions, default=0) < 1 or min(self.asked, default=1) < 1:
            raise ValueError("expected windows with something in them")
        return self


class OnTask(Strict):
    """Which items of a task are answered rightly, and the digest of the task."""

    artifact: str | None
    task: str
    sha256: str
    right: tuple[bool, ...]


class Standing(Strict):
    """All of it, and what the artifact's weights take."""

    text: tuple[OnText, ...]
    tasks: tuple[OnTask, ...]
    weight_bytes: int


@dataclass(frozen=True)
class Place:
    """Where sums are of."""

    artifact: str | None
    prompts: PromptSet
    phase: Phase


def of_baseline(place: Place, windows: Sequence[WindowScores], answers: Sequence[Answer]) -> OnText:
    nll = [window.scores.nll_baseline for window in windows]
    right = [window.scores.baseline_right for window in windows]
    return _on_text(place, nll, right, answers, "baseline")


def of_candidate(place: Place, windows: Sequence[WindowScores], answers: Sequence[Answer]) -> OnText:
    beside = {
        "kl_divergence": _sums([window.scores.kl_divergence for window in windows]),
        "same_top1": _counts([window.scores.same_top1 for window in windows]),
    }
    return alone(place, windows, answers).model_copy(update=beside)


def alone(place: Place, windows: Sequence[WindowScores], answers: Sequence[Answer]) -> OnText:
    """A candidate, without what it has beside the baseline."""
    nll = [window.scores.nll_candidate for window in windows]
    right = [window.scores.candidate_right for window in windows]
    return _on_text(place, nll, right, answers, "candidate")


def of_task(artifact: str | None, answered: "Answered", who: Who) -> OnTask:
    right: Array = getattr(answered, who)
    task = answered.task
    return OnTask(artifact=artifact, task=task.name, sha256=task.digest(), right=tuple(right.tolist()))


def _on_text(place: Place, nll: list[Array], right: list[Array], answers: Sequence[Answer], who: Who) -> OnText:
    asked: dict[int, list[bool]] = {}
    for answer in answers:
        asked.setdefault(answer.question.window, []).append(getattr(answer, who))
    return OnText(
        artifact=place.artifact,
        prompts=place.prompts.name,
        sha256=digest(place.prompts.windows),
        phase=place.phase,
        positions=tuple(map(len, nll)),
        nll=_sums(nll),
        right=_counts(right),
        asked=tuple(map(len, asked.values())),
        answered=tuple(map(sum, asked.values())),
    )


def _sums(windows: Sequence[Array]) -> tuple[float | None, ...]:
    return tuple(finite(float(values.sum())) for values in windows)


def _counts(windows: Sequence[Array]) -> tuple[int, ...]:
    return tuple(int(values.sum()) for values in windows)


def as_array(sums: Sequence[float | None]) -> Array:
    """Sums again, with NaN for what is no number."""
    return np.array([math.nan if value is None else value for value in sums], float)
