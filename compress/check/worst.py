"""The windows that the candidate changes most, with their text where it changes most, and what both make of that."""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch

from compress.check import generated
from compress.check.generated import Task
from compress.check.metrics import WindowScores, summarize
from compress.check.scored import Scored
from compress.checkpoint.end_tokens import end_tokens
from compress.prompts import PromptSet
from compress.recipe.source import tokenizer_of
from compress.runtime.artifacts import Artifact
from compress.strict.json_text import finite

MOST = 5  # of an artifact
CONTEXT = 60  # tokens that are shown, and read
TOKENS = 24  # that each goes on with
DOING = "worst prompts"  # what the progress of going on is shown under


class WorstFacts(TypedDict):
    """One window of a prompt set, and the token of it, counted from 0, whose prediction the candidate changes most. `text` is
    what both read before that token, `baseline_text` and `candidate_text` what each goes on with (None where neither was asked
    to). Figures are None where they are not finite."""

    artifact: str
    phase: str
    prompts: str
    window: int
    position: int
    kl_divergence_mean: float | None
    perplexity_ratio: float | None
    text: str | None
    baseline_text: str | None
    candidate_text: str | None


def find(artifact: str, phase: str, sets: Sequence[Scored]) -> list[WorstFacts]:
    """Those of the largest mean divergence, without text as yet; windows that are as they were are none."""
    found = [
        _row(artifact, phase, scored.prompts.name, place, window)
        for scored in sets
        for place, window in scored.windows.items()
        if window.scores.kl_divergence.any()  # NaN, too
    ]
    return sorted(found, key=_size, reverse=True)[:MOST]


def _row(artifact: str, phase: str, prompts: str, place: int, window: WindowScores) -> WorstFacts:
    values = summarize(window.scores)
    return {
        "artifact": artifact,
        "phase": phase,
        "prompts": prompts,
        "window": place,
        "position": window.first + int(np.argmax(window.scores.kl_divergence)),  # the first NaN, where there is one
        "kl_divergence_mean": finite(values["kl_divergence_mean"]),
        "perplexity_ratio": finite(values["perplexity_ratio"]),
        "text": None,
        "baseline_text": None,
        "candidate_text": None,
    }


def _size(row: WorstFacts) -> float:
    return np.inf if row["kl_divergence_mean"] is None else row["kl_divergence_mean"]


def tell(
    rows: list[WorstFacts], sets: Sequence[PromptSet], original: Artifact, model_sha256: str, artifact: Artifact
) -> None:
    """Puts texts into the rows, which are of one artifact: nothing without a tokenizer, and what is read alone where a model
    is read from disk anew for every token."""
    tokenizer = tokenizer_of(original.folder)
    if tokenizer is None or not rows:
        return
    read = list(_contexts(rows, sets))
    for row, tokens in zip(rows, read, strict=True):
        row["text"] = tokenizer.decode(tokens.tolist())
    if original.bytes_read_per_step() or artifact.bytes_read_per_step():
        return
    task = Task((tuple(read),), TOKENS, tuple(end_tokens(original.config, original.folder)), DOING)
    before = generated.of_baseline(original, model_sha256, task)
    after = generated.generate(rows[0]["artifact"], artifact, task)
    for row, one, other in zip(rows, before, after, strict=True):
        row["baseline_text"], row["candidate_text"] = (tokenizer.decode(text.tokens) for text in (one, other))


def _contexts(rows: Sequence[WorstFacts], sets: Sequence[PromptSet]) -> Iterator[torch.Tensor]:
    windows = {found.name: found.windows for found in sets}
    for row in rows:
        yield windows[row["prompts"]][row["window"]][max(0, row["position"] - CONTEXT) : row["position"]]
