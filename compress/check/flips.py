"""Positions whose most likely token is right for one model and not for the other."""

from typing import TypedDict


class FlipFacts(TypedDict):
    """Counts over the scored positions of a phase and a prompt set (or `all`), and the exact two-sided McNemar p-value of
    `only_baseline` against `only_candidate`."""

    artifact: str
    phase: str
    prompts: str
    positions: int
    both_right: int
    only_baseline: int
    only_candidate: int
    neither: int
    p_value: float
