"""What every runtime is fed: a prefill and steps, one of several chunks (of Mamba-2's recurrence), tokens one by one from
nothing (most experts get no row), and a batch of three padded on the left. Numpy only: the interpreter with the oldest
onnxruntime runs it too."""

import numpy as np

CUTS = {"alone": [30] + [1] * 6, "two chunks": [70, 1], "one by one": [1] * 5, "padded": [24] + [1] * 4}
LENGTHS = [28, 15, 2]  # of the padded rows


def make(vocabulary: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> ids and mask, [B, S]."""
    g, found = np.random.default_rng(7), {}
    for name, cuts in CUTS.items():
        shape = (3 if name == "padded" else 1, sum(cuts))
        found[name] = g.integers(3, vocabulary, shape), np.ones(shape, np.int64)
    for row, length in enumerate(LENGTHS):
        found["padded"][1][row, :-length] = 0
    return found


def run(start, vocabulary: int) -> dict[str, np.ndarray]:
    """Name -> logits [B, S, V], zero on padding. `start(batch)` returns what takes new ids and the whole mask."""
    found = {}
    for name, (ids, mask) in make(vocabulary).items():
        step, pieces, seen = start(len(ids)), [], 0
        for count in CUTS[name]:
            seen += count
            pieces.append(np.array(step(ids[:, seen - count : seen], mask[:, :seen])))
        found[name] = np.concatenate(pieces, 1) * mask[:, :, None]
    return found


def past_shape(shape: list, batch: int) -> list[int]:
    """Of a past input before the first token; what is no number in `shape` is a past of length 0, but for the batch in front."""
    return [batch, *(size if isinstance(size, int) else 0 for size in shape[1:])]
