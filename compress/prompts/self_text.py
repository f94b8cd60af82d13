"""Text sampled from the model itself: for users without data, and for contexts of any length."""

import hashlib
import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from compress import parallel
from compress.checkpoint.end_tokens import end_tokens
from compress.disk import cache
from compress.prompts.windows import refuse_foreign_tokens
from compress.runtime.artifacts import Artifact
from compress.runtime.inference import sample
from compress.terminal.progress import Advance

BATCH = 32
VERSION = 1  # part of the cache key: raise it when the sampling changes


def windows(model: Artifact, model_sha256: str, samples: int, length: int, seed: int,
            progress: Advance | None = None) -> list[torch.Tensor]:  # fmt: skip
    """`samples` windows of `length` tokens drawn at temperature 1 from BOS; kept on disk per model, seed and size.

    The model's `config` names BOS, it and the `folder` the ends of text, `steps(batch)` generates.
    """
    ends = end_tokens(model.config, model.folder)
    cache.folder("self-text")

    def write(file: BinaryIO) -> None:
        sizes = enumerate(_sizes(samples))
        batches = [_batch(model, size, length, seed + i, ends, progress) for i, size in sizes]
        buffer = io.BytesIO()  # numpy writes to a real file behind Python's back: a full disk has no errno then
        np.save(buffer, np.concatenate(batches).astype(np.int32))
        file.write(buffer.getbuffer())

    with cache.entry(path(model, model_sha256, seed, samples, length), write) as file:
        return list(torch.from_numpy(np.load(file)).long())


def path(model: Artifact, model_sha256: str, seed: int, samples: int, length: int) -> Path:
    """Where the windows are kept."""
    ends = end_tokens(model.config, model.folder)
    key = hashlib.sha256(f"{VERSION}/{model_sha256}/{seed}/{samples}/{length}/{ends}".encode()).hexdigest()[:32]
    return cache.location("self-text") / f"{key}.npy"


def _sizes(samples: int) -> list[int]:
    return [min(BATCH, samples - start) for start in range(0, samples, BATCH)]


@parallel.steady()
def _batch(
    model: Artifact, batch: int, length: int, seed: int, ends: list[int], progress: Advance | None
) -> np.ndarray:
    """[batch, length] ids. After an end-of-text token comes BOS and a new text."""
    bos = model.config.bos_token_id if model.config.bos_token_id is not None else 0
    refuse_foreign_tokens(bos, model.config.vocab_size)
    steps, generator = model.steps(batch), torch.Generator().manual_seed(seed)
    ids = [torch.full((batch,), bos)]
    for _ in range(length - 1):
        drawn = sample(steps.step(ids[-1][:, None]), 1.0, generator)
        ids.append(torch.where(torch.isin(ids[-1], torch.tensor(ends)), bos, drawn))
        if progress is not None:
            progress(batch)
    return torch.stack(ids, 1).numpy()
