"""Questions in a prompt set: where a window's next token is an answer, and how far back what it asks for stands."""

import itertools
from dataclasses import dataclass

import torch

FIRST_EDGES = (0, 64, 256)  # of buckets of positions and distances; after them every bucket is as long as all before it


@dataclass(frozen=True)
class Question:
    """The answer is token `position` of `window`; its `distance` is known to lie between two numbers, both included."""

    window: int
    position: int
    distance: tuple[int, int]


@dataclass(frozen=True)
class Asked:
    """Windows of token ids and the questions in them."""

    windows: list[torch.Tensor]
    questions: tuple[Question, ...]


def bucket_of(place: int) -> tuple[int, int]:
    """The first and last place of the bucket that a position or a distance is in: 0-63, 64-255, 256-511, 512-1023, ..."""
    return next(bucket for bucket in buckets(place) if bucket[0] <= place <= bucket[1])


def buckets(last: int) -> list[tuple[int, int]]:
    """All of them up to the one that `last` is in."""
    edges = [*FIRST_EDGES]
    while edges[-1] <= last:
        edges.append(2 * edges[-1])
    return [(start, stop - 1) for start, stop in itertools.pairwise(edges) if start <= last]
