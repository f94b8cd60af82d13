"""What becomes of states while windows are decoded: how large they are beside the original's, and what saturates.

Sizes are looked at where the ranges of `by_position` end, in the first windows of each prompt set. The original reads the same
windows in calls that stop there. What a format cannot hold is counted after every decoded token.
"""

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NotRequired, TypedDict

import numpy as np
import torch

from compress import prompts
from compress.check import carried
from compress.disk import cache
from compress.formats.remembered import MOST, Precision
from compress.model.config import Config
from compress.model.states import StateKind, StateSpec
from compress.prompts import PromptSet
from compress.prompts.questions import buckets
from compress.runtime.candidates import StatefulCandidate
from compress.runtime.kept import Kept
from compress.strict.json_text import finite
from compress.terminal import progress

WINDOWS = 8  # of each prompt set, whose states are measured: a root mean square is an average of many entries already
STAGE = "states of the baseline"  # what the progress of reading them is shown under
VERSION = 1  # part of the key: raise it when our forward changes its values
DYNAMIC = "0 by construction: each scale is that of the largest entry it serves"


class HealthFacts(TypedDict):
    """The root mean square over a kind of state in a layer once token `position` of a window was read (its last token, of
    windows that end before). `ratio` is to the baseline's. None is not finite, or not there."""

    artifact: str
    layer: int
    kind: str
    position: int
    rms: float | None
    baseline_rms: float | None
    ratio: float | None


class SaturationFacts(TypedDict):
    """How many of the stored entries lie at the largest number of their format, counted at every decoded token; those of a
    cache once."""

    artifact: str
    layer: int
    kind: str
    format: str
    scale: NotRequired[str]
    entries: int
    saturated: int
    share: float
    note: NotRequired[str]


@dataclass
class Size:
    """Of a kind of state in a layer, over the windows that end a range of positions: the furthest of them, sum of squares."""

    position: int = 0
    squares: float = 0.0
    entries: int = 0

    @property
    def rms(self) -> float | None:
        return finite(math.sqrt(self.squares / self.entries)) if self.squares >= 0 and self.entries else None


Key = tuple[int, StateKind, int]  # layer, kind, first position of the range
Sizes = dict[Key, Size]


def are_watched(asked: bool | None, config: Config) -> bool:
    """Whether an artifact's states are looked at: as asked, else where some are kept in formats of their own."""
    return any(state.format != "fp32" for state in config.compress.states) if asked is None else asked


@dataclass(frozen=True)
class Places:
    """Where an artifact's states are looked at: at the end of the prompt of `prefill` tokens or later, and after a multiple of
    `every` tokens, when all have just been rounded. In between, what is stored of some is older than their value."""

    prefill: int
    every: int

    @staticmethod
    def of(config: Config, prefill: int) -> "Places":
        return Places(prefill, math.lcm(*(state.every for state in config.compress.states)))

    @functools.cache  # noqa: B019 - a handful of them
    def looks(self, length: int) -> dict[int, int]:
        """After how many tokens of a window, and where each range begins. The last token is not read, since nothing is scored
        after it."""
        if length <= max(1, self.prefill):
            return {}
        ends = ((first, min(last, length - 2) + 1) for first, last in buckets(length - 2))
        whole = ((first, end - end % self.every) for first, end in ends)
        return {end: first for first, end in whole if end > first and end >= self.prefill}

    def calls(self, length: int) -> Iterator[tuple[int, int]]:
        """Those in which the original reads a window."""
        return itertools.pairwise((0, *self.looks(length), length))


class Watch:
    """Hears of one artifact's states while it decodes, those of any prompt set."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.sizes: Sizes = {}
        self._counts: dict[tuple[int, StateKind, Precision], list[int]] = {}  # entries, saturated ones

    def hear(self, kept: Kept) -> None:
        measure(kept, self.sizes, self._places)
        if max(1, self._places.prefill) <= kept.length - 1 >= kept.read:  # as above
            for spec in kept.layer.states:
                self._count(kept, spec)

    def _count(self, kept: Kept, spec: StateSpec) -> None:
        is_last = kept.read == kept.length - 1
        if spec.precision.format == "fp32" or (spec.grows is not None and not is_last):
            return
        key = kept.layer.index, spec.kind, replace(spec.precision, seed=0)
        count = self._counts.setdefault(key, [0, 0])
        count[0] += len(kept.windows) * spec.elements(kept.read)
        saturated = _are_saturated(kept.stored[spec.name], spec)
        count[1] += 0 if saturated is None else int(saturated.sum())

    def saturation(self, artifact: str) -> list[SaturationFacts]:
        return [_saturation(artifact, *key, *count) for key, count in sorted(self._counts.items(), key=_by_layer)]


def measure(kept: Kept, sizes: Sizes, places: Places) -> None:
    """Adds the states of the windows that are looked at, where they are."""
    rows = [row for row, window in enumerate(kept.windows) if window < WINDOWS]
    first = places.looks(kept.length).get(kept.read)
    if first is None or not rows:
        return
    values = kept.begun_with(rows)
    for spec in kept.layer.states:
        size, value = sizes.setdefault((kept.layer.index, spec.kind, first), Size()), values[spec.name]
        size.position = max(size.position, kept.read - 1)
        size.squares += float(value.double().square().sum())
        size.entries += value.numel()


def _are_saturated(stored: torch.Tensor, spec: StateSpec) -> torch.Tensor | None:
    """Which entries are at the largest number; what is not finite is one of them. Dynamic scales leave none: None."""
    if spec.precision.is_plain:
        codes, most = stored, torch.finfo(stored.dtype).max
    elif spec.precision.has_static_scale:
        unit = torch.ones(spec.scale_shape, device=stored.device)
        codes, most = spec.restored(stored, unit), MOST[spec.precision.format]
    else:
        return None
    return ~(codes.abs() < most)


def _by_layer(item: tuple[tuple[int, StateKind, Precision], list[int]]) -> tuple[int, int, str]:
    (layer, kind, precision), _ = item
    return layer, list(StateKind).index(kind), str(precision)


def _saturation(
    artifact: str, layer: int, kind: StateKind, precision: Precision, entries: int, saturated: int
) -> SaturationFacts:
    row: SaturationFacts = {
        "artifact": artifact,
        "layer": layer,
        "kind": str(kind),
        "format": precision.format,
        "entries": entries,
        "saturated": saturated,
        "share": saturated / entries,
    }
    if not precision.is_plain:
        row["scale"] = precision.scale
        if precision.scale == "dynamic":
            row["note"] = DYNAMIC
    return row


def health(artifact: str, found: Sizes, original: Sizes) -> list[HealthFacts]:
    """A row for each layer, kind and range of positions that the artifact decoded."""
    order = sorted(found, key=lambda key: (key[0], list(StateKind).index(key[1]), key[2]))
    return [_health(artifact, key, found[key], original.get(key, Size())) for key in order]


def _health(artifact: str, key: Key, found: Size, original: Size) -> HealthFacts:
    after, before = found.rms, original.rms
    return {
        "artifact": artifact,
        "layer": key[0],
        "kind": str(key[1]),
        "position": found.position,
        "rms": after,
        "baseline_rms": before,
        "ratio": None if after is None or not before else after / before,
    }


def of_baseline(reference: StatefulCandidate, model_sha256: str, sets: Sequence[PromptSet], places: Places) -> Sizes:
    """The original's, from the cache where they are there."""
    cache.folder("states")
    windows = [prompt_set.windows[:WINDOWS] for prompt_set in sets]
    path = _path(f"{model_sha256}/{places}", windows)
    asked = carried.asking_for("the size of its states, which --no-states leaves out")
    with asked, cache.entry(path, lambda file: _write(reference, windows, places, file)) as file:
        rows = np.load(file).tolist()
    kinds = list(StateKind)
    return {(int(row[0]), kinds[int(row[1])], int(row[2])): Size(int(row[3]), row[4], int(row[5])) for row in rows}


def _path(key: str, windows: Sequence[list[torch.Tensor]]) -> Path:
    tokens = "/".join(map(prompts.digest, windows))
    digest = hashlib.sha256(f"{VERSION}/{key}/{tokens}".encode()).hexdigest()[:32]
    return cache.location("states") / f"{digest}.npy"


def _write(reference: StatefulCandidate, sets: Sequence[list[torch.Tensor]], places: Places, file: BinaryIO) -> None:
    sizes: Sizes = {}
    tokens = sum(len(window) for windows in sets for window in windows)
    with progress.task(STAGE, reference.steps(tokens)) as advance:
        for windows in sets:
            reference.remember(windows, places.calls, advance, lambda kept: measure(kept, sizes, places))
    np.save(file, np.array(list(_rows(sizes)), np.float64).reshape(-1, 6))


def _rows(sizes: Sizes) -> Iterator[tuple[float, ...]]:
    for (layer, kind, first), size in sizes.items():
        yield layer, list(StateKind).index(kind), first, size.position, size.squares, size.entries
