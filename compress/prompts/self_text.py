"""Text sampled from the model itself: for users without data, and for contexts of any length."""

import hashlib

import numpy as np
import torch

from compress import cache, parallel
from compress.inference import sample
from compress.prompts.windows import refuse_foreign_tokens

BATCH = 32
VERSION = 1  # part of the cache key: raise it when the sampling changes


def windows(model, model_sha256: str, samples: int, length: int, seed: int, progress=None) -> list[torch.Tensor]:
    """`samples` windows of `length` tokens drawn at temperature 1 from BOS; kept on disk per model, seed and size.

    `model` is an `Artifact`: its `config` names BOS and end of text, its `steps(batch)` generates.
    """
    key = hashlib.sha256(f"{VERSION}/{model_sha256}/{seed}/{samples}/{length}".encode()).hexdigest()[:32]
    path = cache.folder("self-text") / f"{key}.npy"
    if not path.is_file():
        ids = np.concatenate(
            [_batch(model, size, length, seed + i, progress) for i, size in enumerate(_sizes(samples))]
        )
        with cache.publish(path) as partial, open(partial, "wb") as file:
            np.save(file, ids.astype(np.int32))
    return list(torch.from_numpy(np.load(path)).long())


def _sizes(samples: int) -> list[int]:
    return [min(BATCH, samples - start) for start in range(0, samples, BATCH)]


@parallel.steady()
def _batch(model, batch: int, length: int, seed: int, progress) -> np.ndarray:
    """[batch, length] ids. After an end-of-text token comes BOS and a new text."""
    bos = model.config.bos_token_id if model.config.bos_token_id is not None else 0
    refuse_foreign_tokens(bos, model.config.vocab_size)
    ends = model.config.eos_token_id
    ends = torch.tensor([] if ends is None else ends if isinstance(ends, list) else [ends])
    steps, generator = model.steps(batch), torch.Generator().manual_seed(seed)
    ids = [torch.full((batch,), bos)]
    for _ in range(length - 1):
        drawn = sample(steps.step(ids[-1][:, None]), 1.0, generator)
        ids.append(torch.where(torch.isin(ids[-1], ends), bos, drawn))
        if progress is not None:
            progress(batch)
    return torch.stack(ids, 1).numpy()
