"""Windows of text in two halves that share no passage and no seed, and what candidates score on them.

Limits are derived on one half (`even`: held-out passages 0, 2, ..., text sampled with seeds 0 and 2) and looked at on the other
(`odd`). A candidate is scored once; whatever needs other windows draws them from what is kept.
"""

from pathlib import Path

import numpy as np
import torch

from compress.check.metrics import Scores, score
from compress.checkpoint.reader import Checkpoint
from compress.prompts import passages, self_text
from compress.prompts.windows import join_and_cut
from compress.recipe.source import load_tokenizer
from compress.runtime.artifacts import CheckpointArtifact
from compress.runtime.candidates import Candidate, CheckpointCandidate

LENGTH = 512
HALVES = {"even": 0, "odd": 1}
SETS = ("heldout", "self")


def windows(checkpoint: Checkpoint, half: str, heldout: int, sampled: int) -> dict[str, list[torch.Tensor]]:
    """Windows by prompt set: at most so many of the half's held-out passages, and so many sampled with each of its two seeds."""
    artifact, first = CheckpointArtifact(checkpoint), HALVES[half]
    texts = passages.shipped("heldout")[first::2]
    drawn = [self_text.windows(artifact, artifact.sha256(), sampled, LENGTH, seed) for seed in (first, first + 2)]
    return {
        "heldout": join_and_cut(load_tokenizer(checkpoint.folder), texts, heldout, LENGTH, first),
        "self": [window for of_seed in drawn for window in of_seed],
    }


class Pool:
    """The windows of a half, with the original's log-probabilities in memory."""

    def __init__(self, model: Path, half: str, heldout: int, sampled: int):
        self.checkpoint = Checkpoint(model)
        by_set = windows(self.checkpoint, half, heldout, sampled)
        self.sizes = {name: len(found) for name, found in by_set.items()}
        self.windows = [window for found in by_set.values() for window in found]
        vocab = self.checkpoint.model.config.vocab_size
        self._log_p = [torch.empty(len(window) - 1, vocab) for window in self.windows]
        for window, start, logits in self._logits(CheckpointCandidate(self.checkpoint.model), "prefill"):
            self._log_p[window][start : start + len(logits)] = torch.log_softmax(logits, -1)

    def scores(self, candidate: Candidate, phase: str = "prefill") -> list[Scores]:
        """Of each window, in order of positions."""
        pieces: dict[int, dict[int, Scores]] = {}
        for window, start, logits in self._logits(candidate, phase):
            stop = start + len(logits)
            log_p, targets = self._log_p[window][start:stop], self.windows[window][start + 1 : stop + 1]
            pieces.setdefault(window, {})[start] = score(log_p, logits, targets)
        return [Scores.concatenate([found[start] for start in sorted(found)]) for _, found in sorted(pieces.items())]

    def _logits(self, candidate: Candidate, phase: str):
        return candidate.logits(self.windows, phase, lambda tokens: None)


def figures(scores: Scores) -> dict[str, float]:
    """What one candidate costs: means over positions, and how they spread."""
    change, kl = scores.nll_candidate - scores.nll_baseline, scores.kl_divergence
    return {
        "kl": float(kl.mean()),
        "log_ratio": float(change.mean()),
        "deviation": float(change.std()),
        "flips": float(1 - scores.same_top1.mean()),
        "tail": float(np.percentile(kl, 99) / kl.mean()),
    }
