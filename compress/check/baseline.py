"""The original's log-probabilities: computed once and kept on disk (a checkpoint's in float32, layer by layer).

Prefill and decode of an exact model agree, so one pass serves both phases of every candidate. The key is what decides
the values: weights and token ids.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from compress import cache, progress
from compress.check.runners import Candidate
from compress.prompts import PromptSet

VERSION = 1  # part of the key: raise it when our forward changes its values


class Baseline:
    """Log-probabilities [positions, V] of one prompt set: position t of a window predicts its token t + 1."""

    def __init__(self, path: Path, prompt_set: PromptSet, vocab_size: int):
        self._starts = _starts(prompt_set)
        self._file, self._vocab = open(path, "rb"), vocab_size  # noqa: SIM115 - stays open: the cache may drop the name

    def log_probs(self, window: int, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, V] of one window."""
        self._file.seek(4 * self._vocab * int(self._starts[window] + start))
        values = np.fromfile(self._file, dtype=np.float32, count=(stop - start) * self._vocab)
        return torch.from_numpy(values).view(-1, self._vocab)


def bytes_needed(tokens: int, vocab_size: int) -> int:
    return 4 * tokens * vocab_size


def compute(reference: Candidate, model_sha256: str, prompt_set: PromptSet) -> Baseline:
    """The baseline of one prompt set, from the cache where it is there."""
    path = cache.folder("baseline") / f"{_key(model_sha256, prompt_set)}.f32"
    if path.is_file() and path.stat().st_size == bytes_needed(int(_starts(prompt_set)[-1]), reference.vocab_size):
        os.utime(path)
    else:
        with cache.publish(path) as partial:
            _write(reference, prompt_set, partial)
    return Baseline(path, prompt_set, reference.vocab_size)


def _key(model_sha256: str, prompt_set: PromptSet) -> str:
    digest = hashlib.sha256(f"{VERSION}/{model_sha256}".encode())
    for window in prompt_set.windows:
        digest.update(f"/{len(window)}/".encode() + window.numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(reference: Candidate, prompt_set: PromptSet, path: Path) -> None:
    starts, row_bytes = _starts(prompt_set), 4 * reference.vocab_size
    total = reference.steps(prompt_set.tokens)
    with open(path, "wb") as file, progress.task(f"baseline on {prompt_set.name}", total) as advance:
        for window, start, logits in reference.logits(prompt_set.windows, "prefill", advance):
            file.seek(row_bytes * int(starts[window] + start))
            torch.log_softmax(logits.float(), dim=-1).numpy().tofile(file)


def _starts(prompt_set: PromptSet) -> np.ndarray:
    """The first row of each window in the file: a window of n tokens has n - 1."""
    return np.concatenate([[0], np.cumsum([len(window) - 1 for window in prompt_set.windows])])
