"""The original's log-probabilities: computed once and kept on disk (a checkpoint's in float32, layer by layer).

Prefill and decode of an exact model agree, so one pass serves both phases of every candidate. The key is what decides
the values: weights and token ids.
"""

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from compress.check import carried
from compress.disk import cache
from compress.disk.cache import Opened
from compress.disk.paths import as_text
from compress.prompts import PromptSet, Settings, self_text
from compress.prompts.seeds import derive_seed
from compress.runtime.artifacts import Artifact
from compress.runtime.candidates import Candidate
from compress.terminal import progress

VERSION = 1  # part of the key: raise it when our forward changes its values


def stage(prompt_set: str) -> str:
    """What the progress of computing it is shown under."""
    return f"baseline on {as_text(prompt_set)}"


class Baseline:
    """Log-probabilities [positions, V] of one prompt set: position t of a window predicts its token t + 1.

    `source` is a file's path, or the open file, which the cache may meanwhile drop the name of.
    """

    def __init__(self, source: Path | Opened, prompt_set: PromptSet, vocab_size: int):
        self._starts, self._vocab = _starts(prompt_set), vocab_size
        self._file = open(source, "rb") if isinstance(source, Path) else source  # noqa: SIM115 - stays open

    def log_probs(self, window: int, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, V] of one window."""
        self._file.seek(4 * self._vocab * int(self._starts[window] + start))
        values = torch.empty(stop - start, self._vocab)
        self._file.readinto(values.numpy().data.cast("B"))
        return values


def bytes_needed(tokens: int, vocab_size: int) -> int:
    return 4 * tokens * vocab_size


def refuse_full_disk(artifact: Artifact, model_sha256: str, sets: list[PromptSet]) -> None:
    """Says before the work that what is not in the cache yet would not fit beside the hidden states of one set.

    `artifact` is the baseline's; hidden states wait on disk where a checkpoint is computed, the candidate's included.
    """
    states = 4 * artifact.config.hidden_size * max(prompt_set.tokens for prompt_set in sets)
    missing = [s for s in sets if not cache.is_there(_path(model_sha256, s))]
    rows = sum(int(_starts(prompt_set)[-1]) for prompt_set in missing)
    need = states + bytes_needed(rows, artifact.config.vocab_size)
    cache.refuse_full_disk(need, "the baseline's log-probabilities and hidden states")


def refuse_long_own_text(artifact: Artifact, model_sha256: str, settings: Settings, seed: int) -> None:
    """The same for text that the model is to write itself, which is as long as asked for: before it is written."""
    seed = derive_seed(seed, "check", "self")
    kept = self_text.path(artifact, model_sha256, seed, settings.samples, settings.length)
    if "self" in settings.prompts and not cache.is_there(kept):
        need = bytes_needed(settings.samples * (settings.length - 1), artifact.config.vocab_size)
        cache.refuse_full_disk(need, "the baseline's log-probabilities")


def compute(reference: Candidate, model_sha256: str, prompt_set: PromptSet) -> Baseline:
    """The baseline of one prompt set, from the cache where it is there."""
    cache.folder("baseline")
    with carried.asking_for(f"log-probabilities of the prompts '{prompt_set.name}' as they read here"):
        file = cache.entry(_path(model_sha256, prompt_set), lambda file: _write(reference, prompt_set, file))
    return Baseline(file, prompt_set, reference.vocab_size)


def _path(model_sha256: str, prompt_set: PromptSet) -> Path:
    return cache.location("baseline") / f"{_key(model_sha256, prompt_set)}.f32"


def _key(model_sha256: str, prompt_set: PromptSet) -> str:
    digest = hashlib.sha256(f"{VERSION}/{model_sha256}".encode())
    for window in prompt_set.windows:
        digest.update(f"/{len(window)}/".encode() + window.numpy().tobytes())
    return digest.hexdigest()[:32]


def _write(reference: Candidate, prompt_set: PromptSet, file: BinaryIO) -> None:
    starts, row_bytes = _starts(prompt_set), 4 * reference.vocab_size
    total = reference.steps(prompt_set.tokens)
    with progress.task(stage(prompt_set.name), total) as advance:
        for window, start, logits in reference.logits(prompt_set.windows, "prefill", advance):
            file.seek(row_bytes * int(starts[window] + start))
            file.write(torch.log_softmax(logits.float(), dim=-1).numpy().data)


def _starts(prompt_set: PromptSet) -> np.ndarray:
    """The first row of each window in the file: a window of n tokens has n - 1."""
    return np.concatenate([[0], np.cumsum([len(window) - 1 for window in prompt_set.windows])])
