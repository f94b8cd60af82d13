"""Positions whose most likely token is right for one model and not for the other."""

from collections.abc import Sequence
from typing import TypedDict

from compress.check import statistics
from compress.check.metrics import Scores, WindowScores


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


def flips(artifact: str, phase: str, prompts: str, windows: Sequence[WindowScores]) -> FlipFacts:
    """Of all positions of the windows, of which there are some."""
    scores = Scores.concatenate([window.scores for window in windows])
    before, after = scores.baseline_right, scores.candidate_right
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    return {
        "artifact": artifact,
        "phase": phase,
        "prompts": prompts,
        "positions": len(scores),
        "both_right": int((before & after).sum()),
        "only_baseline": lost,
        "only_candidate": gained,
        "neither": int((~before & ~after).sum()),
        "p_value": statistics.mcnemar(lost, gained),
    }
