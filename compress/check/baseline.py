"""The original's log-probabilities: computed once in float32, layer by layer, and kept on disk.

Prefill and decode of an exact model agree, so one pass serves both phases of every candidate. The key is what decides
the values: weights and token ids.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from compress import cache, progress
from compress.inference import Head, stream
from compress.model import HybridModel
from compress.prompts import PromptSet

VERSION = 1  # part of the key: raise it when our forward changes its values
ROWS = 256  # positions whose logits are in memory together


class Baseline:
    """Log-probabilities [positions, V] of one prompt set: position t of a window predicts its token t + 1."""

    def __init__(self, path: Path, prompt_set: PromptSet, vocab_size: int):
        lengths = [len(window) - 1 for window in prompt_set.windows]
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._file, self._vocab = open(path, "rb"), vocab_size  # noqa: SIM115 - stays open: the cache may drop the name

    def log_probs(self, window: int, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, V] of one window."""
        self._file.seek(4 * self._vocab * int(self._starts[window] + start))
        values = np.fromfile(self._file, dtype=np.float32, count=(stop - start) * self._vocab)
        return torch.from_numpy(values).view(-1, self._vocab)


def bytes_needed(tokens: int, vocab_size: int) -> int:
    return 4 * tokens * vocab_size


def compute(model: HybridModel, weights_sha256: str, prompt_set: PromptSet, device: str = "cpu") -> Baseline:
    """The baseline of one prompt set, from the cache where it is there."""
    path = cache.folder("baseline") / f"{_key(weights_sha256, prompt_set)}.f32"
    if path.is_file():
        path.touch()
    else:
        with cache.publish(path) as partial:
            _write(model, prompt_set, partial, device)
    return Baseline(path, prompt_set, model.config.vocab_size)


def _key(weights_sha256: str, prompt_set: PromptSet) -> str:
    digest = hashlib.sha256(f"{VERSION}/{weights_sha256}".encode())
    for window in prompt_set.windows:
        digest.update(f"/{len(window)}/".encode() + window.numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(model: HybridModel, prompt_set: PromptSet, path: Path, device: str) -> None:
    total = prompt_set.tokens * model.config.num_hidden_layers
    with (
        cache.scratch("baseline") as scratch,
        open(path, "wb") as file,
        progress.task(f"baseline on {prompt_set.name}", total) as advance,
    ):
        head = Head(model, device)
        for _, hidden in stream(model, prompt_set.windows, scratch, device=device, advance=advance):
            for window in hidden:
                for rows in window[:-1].split(ROWS):
                    torch.log_softmax(head(rows), dim=-1).cpu().numpy().tofile(file)
