"""Texts that baseline and artifact go on with from the same prompts, taking the most likely token: their lengths, how much they
repeat, how sure each token is, and where they part."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypedDict

import numpy as np
import torch

from compress import parallel, prompts
from compress.check import carried, statistics
from compress.checkpoint.end_tokens import end_tokens
from compress.disk import cache
from compress.disk.paths import as_text
from compress.prompts import PromptSet
from compress.recipe.check import Generate
from compress.runtime.artifacts import Artifact, Steps
from compress.runtime.candidates import LOGIT_BYTES
from compress.runtime.inference import blocks_of
from compress.strict.json_text import finite
from compress.terminal import progress
from compress.terminal.progress import Advance

BASELINE = "baseline"
GRAM = 4  # tokens of what may be repeated
VERSION = 2  # part of the key: raise it when our forward changes its values
GIB = 1 << 30

FigureName = Literal["length", "repeated_4grams", "entropy", "equal", "first_difference"]


@dataclass(frozen=True)
class Text:
    """Tokens, the one that ended it included, and the entropy (nats) of the distribution that each was the top of."""

    tokens: list[int]
    entropies: list[float]


class GeneratedFacts(TypedDict):
    """A figure over `texts` generated texts: `value` is the candidate's minus the baseline's where they have one each. None
    cannot be told."""

    artifact: str
    figure: FigureName
    texts: int
    baseline: float | None
    candidate: float | None
    value: float | None
    low: float | None
    high: float | None


def stage(artifact: str, doing: str = "generating") -> str:
    """What the progress of generating is shown under."""
    return f"{as_text(artifact)}: {doing}"


@dataclass(frozen=True)
class Task:
    """What both go on from: the beginnings of windows, by prompt set, and where texts end; `doing` is what people are told."""

    sets: tuple[tuple[torch.Tensor, ...], ...]
    tokens: int
    ends: tuple[int, ...]
    doing: str = "generating"

    @property
    def prompts(self) -> list[torch.Tensor]:
        return [prompt for of_set in self.sets for prompt in of_set]


def task(original: Artifact, sets: Sequence[PromptSet], settings: Generate) -> Task:
    """Prompt sets are taken from in turn, so that each is asked."""
    places = [(place, number) for number, found in enumerate(sets) for place in range(len(found.windows))]
    chosen = sorted(places)[: settings.prompts]
    begun = [
        tuple(sets[number].windows[place][: settings.prompt_tokens] for place, of in chosen if of == number)
        for number in range(len(sets))
    ]
    return Task(tuple(begun), settings.tokens, tuple(end_tokens(original.config, original.folder)))


def of_baseline(original: Artifact, model_sha256: str, task: Task) -> list[Text]:
    """The original's texts, from the cache where they are there."""
    cache.folder("generated")

    def write(file: BinaryIO) -> None:
        np.save(file, _as_array(generate(BASELINE, original, task), task.tokens))

    with carried.asking_for("generated texts"), cache.entry(_path(model_sha256, task), write) as file:
        return _as_texts(np.load(file))


def _as_array(texts: Sequence[Text], tokens: int) -> np.ndarray:
    """[texts, 2, tokens]: tokens, -1 behind the last, and entropies."""
    rows = np.full((len(texts), 2, tokens), -1.0)
    for row, text in zip(rows, texts, strict=True):
        row[:, : len(text.tokens)] = text.tokens, text.entropies
    return rows


def _as_texts(rows: np.ndarray) -> list[Text]:
    return [Text(row[0, row[0] >= 0].astype(int).tolist(), row[1, row[0] >= 0].tolist()) for row in rows]


def _path(model_sha256: str, task: Task) -> Path:
    asked = f"{VERSION}/{model_sha256}/{task.tokens}/{task.ends}/{prompts.digest(task.prompts)}"
    return cache.location("generated") / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.npy"


@parallel.steady()
def generate(name: str, artifact: Artifact, task: Task) -> list[Text]:
    """One text for each prompt, those that fit into memory together side by side."""
    _warn_of_reading(name, artifact, task.tokens)
    texts: list[Text] = []
    with progress.task(stage(name, task.doing), len(task.prompts) * task.tokens) as advance:
        for block in blocks_of(task.prompts, LOGIT_BYTES // (4 * artifact.config.vocab_size)):
            begun = torch.stack([task.prompts[place] for place in block])
            texts += _continued(artifact.steps(len(block)), begun, task, advance)
    return texts


def _warn_of_reading(name: str, artifact: Artifact, tokens: int) -> None:
    if again := artifact.bytes_read_per_step():
        progress.warn(
            f"{name}: its weights do not fit into memory, so {again / GIB:.1f} GiB are read anew for each of {tokens} tokens; "
            "'generate: null' leaves generated texts out"
        )


@torch.inference_mode()
def _continued(steps: Steps, begun: torch.Tensor, task: Task, advance: Advance) -> list[Text]:
    """begun [B, S] -> a text each."""
    drawn, entropies, ends, given = list[torch.Tensor](), list[torch.Tensor](), torch.tensor(task.ends), begun
    running = torch.ones(len(begun), dtype=torch.bool)
    while len(drawn) < task.tokens and running.any():
        logits = steps.step(given).float().cpu()
        drawn.append(logits.argmax(-1))
        entropies.append(torch.distributions.Categorical(logits=logits, validate_args=False).entropy())
        running &= ~torch.isin(drawn[-1], ends)
        given = drawn[-1][:, None]
        advance(len(begun))
    advance(len(begun) * (task.tokens - len(drawn)))
    rows = zip(torch.stack(drawn, 1).tolist(), torch.stack(entropies, 1).tolist(), strict=True)
    return [_until_end(*row, task.ends) for row in rows]


def _until_end(tokens: list[int], entropies: list[float], ends: Sequence[int]) -> Text:
    """The end included."""
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return Text(tokens[:stop], entropies[:stop])


def figures(artifact: str, task: Task, before: Sequence[Text], after: Sequence[Text]) -> list[GeneratedFacts]:
    """What the texts of baseline and candidate have in common, and what not."""
    pairs, strata = list(zip(before, after, strict=True)), [len(of_set) for of_set in task.sets]
    return [
        _both(artifact, "length", np.array([[_length(text, task.ends), 1] for p in pairs for text in p]), strata),
        _both(artifact, "repeated_4grams", np.array([_repeated(text) for p in pairs for text in p]), strata),
        _both(
            artifact,
            "entropy",
            np.array([[sum(text.entropies), len(text.tokens)] for p in pairs for text in p]),
            strata,
        ),
        _equal(artifact, pairs, strata),
        _first_difference(artifact, pairs, strata),
    ]


def _length(text: Text, ends: Sequence[int]) -> int:
    """Tokens until an end, which is none of them."""
    return len(text.tokens) - (text.tokens[-1] in ends)


def _repeated(text: Text) -> tuple[int, int]:
    """Runs of four tokens that stand in the text before, of all of them (Welleck et al., arXiv 1908.04319: seq-rep-4)."""
    grams = [tuple(text.tokens[start : start + GRAM]) for start in range(len(text.tokens) - GRAM + 1)]
    return len(grams) - len(set(grams)), len(grams)


def _both(artifact: str, figure: FigureName, counts: np.ndarray, strata: Sequence[int]) -> GeneratedFacts:
    """Means of both over all texts, [top, bottom] of each baseline text and candidate text in turn."""
    before, after = counts[::2], counts[1::2]
    if not before[:, 1].sum() or not after[:, 1].sum():
        return _row(artifact, figure, len(before), None, None, None, None)
    baseline, candidate = (float(part[:, 0].sum() / part[:, 1].sum()) for part in (before, after))
    first, second = (statistics.ratio(part[:, 0], part[:, 1]) for part in (after, before))
    has_changed = not np.array_equal(before, after)
    interval = statistics.interval(lambda drawn: first(drawn) - second(drawn), strata) if has_changed else None
    return _row(artifact, figure, len(before), baseline, candidate, candidate - baseline, interval)


def _equal(artifact: str, pairs: Sequence[tuple[Text, Text]], strata: Sequence[int]) -> GeneratedFacts:
    same = np.array([float(before.tokens == after.tokens) for before, after in pairs])
    value, interval = float(same.mean()), None
    if value in (0.0, 1.0):  # which drawing anew would take for certainty
        reach = statistics.of_no_change(len(same))[1]
        interval = (1 - reach, 1.0) if value else (0.0, reach)
    else:
        interval = statistics.interval(statistics.ratio(same, np.ones(len(same))), strata, within=(0, 1))
    return _row(artifact, "equal", len(pairs), None, None, value, interval)


def _first_difference(artifact: str, pairs: Sequence[tuple[Text, Text]], strata: Sequence[int]) -> GeneratedFacts:
    """The mean place, from 0, of the first token that is another, over the texts that differ."""
    places = np.array([_parting(*pair) for pair in pairs])
    differ = places >= 0
    if not differ.any():
        return _row(artifact, "first_difference", 0, None, None, None, None)
    owners = np.repeat(np.arange(len(strata)), strata)[differ]
    parted, left = places[differ], [int((owners == number).sum()) for number in range(len(strata))]
    interval = statistics.interval(statistics.ratio(parted, np.ones(len(parted))), left)
    return _row(artifact, "first_difference", len(parted), None, None, float(parted.mean()), interval)


def _parting(before: Text, after: Text) -> int:
    """-1 where they are the same."""
    pairs = zip(
        before.tokens, after.tokens, strict=False
    )  # no text is the beginning of another: each ends alike, or at the maximum
    return next((place for place, (a, b) in enumerate(pairs) if a != b), -1)


def _row(
    artifact: str, figure: FigureName, texts: int, baseline: float | None, candidate: float | None, value: float | None,
    interval: statistics.Interval | None,
) -> GeneratedFacts:  # fmt: skip
    low, high = interval or (None, None)
    return {
        "artifact": artifact,
        "figure": figure,
        "texts": texts,
        "baseline": finite(baseline),
        "candidate": finite(candidate),
        "value": finite(value),
        "low": low,
        "high": high,
    }
