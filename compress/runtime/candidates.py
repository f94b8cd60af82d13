"""Candidates: whatever gives logits for windows of tokens, in one pass (`prefill`) or token by token (`decode`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from compress.disk import cache
from compress.model.hybrid import HybridModel
from compress.recipe.check import PHASES as PHASES
from compress.runtime.inference import Advance, Head, blocks_of, stream
from compress.runtime.onnx_session import OnnxSession

LOGIT_BYTES = 64 << 20  # of logits in memory together
DECODE_BATCH = 16  # windows decoded side by side
ROWS = 256

Piece = tuple[int, int, torch.Tensor]  # window, first position, logits [n, V]


class Candidate(Protocol):
    vocab_size: int

    def logits(self, windows: list[torch.Tensor], phase: str, advance: Advance) -> Iterator[Piece]:
        """The logits of every position but the last of each window, in pieces in any order."""

    def steps(self, tokens: int) -> int:
        """How far `advance` counts over this many tokens."""


class CheckpointCandidate:
    """A checkpoint folder through our own forward, layer by layer: it may be larger than memory."""

    def __init__(self, model: HybridModel, device: str = "cpu"):
        self._model, self._device, self.vocab_size = model, device, model.config.vocab_size

    def steps(self, tokens: int) -> int:
        return tokens * self._model.config.num_hidden_layers

    def logits(self, windows: list[torch.Tensor], phase: str, advance: Advance) -> Iterator[Piece]:
        head = Head(self._model, self._device)
        with cache.scratch("candidate") as scratch:
            for block, hidden in stream(
                self._model, windows, scratch, device=self._device, decode=phase == "decode", advance=advance
            ):
                for window, states in zip(block, hidden, strict=True):
                    for start in range(0, len(states) - 1, ROWS):
                        yield window, start, head(states[start : min(start + ROWS, len(states) - 1)]).cpu()


class OnnxCandidate:
    """An exported model.onnx under onnxruntime, with the session options a user gets by default unless others are given."""

    def __init__(self, path: Path, options: dict[str, str] | None = None):
        self._session = OnnxSession(path, options)
        self.vocab_size = self._session.vocab_size

    def steps(self, tokens: int) -> int:
        return tokens

    def logits(self, windows: list[torch.Tensor], phase: str, advance: Advance) -> Iterator[Piece]:
        longest = max(map(len, windows))
        tokens = max(longest, LOGIT_BYTES // (4 * self.vocab_size)) if phase == "prefill" else longest * DECODE_BATCH
        for block in blocks_of(windows, tokens):
            ids = torch.stack([windows[i] for i in block]).numpy()
            yield from self._prefill(block, ids) if phase == "prefill" else self._decode(block, ids)
            advance(ids.size)

    def _prefill(self, block: list[int], ids: np.ndarray) -> Iterator[Piece]:
        logits = torch.from_numpy(self._session.start(len(ids)).step(ids))
        for window, values in zip(block, logits, strict=True):
            for start in range(0, len(values) - 1, ROWS):
                yield window, start, values[start : min(start + ROWS, len(values) - 1)]

    def _decode(self, block: list[int], ids: np.ndarray) -> Iterator[Piece]:
        generation = self._session.start(len(ids))
        for t in range(ids.shape[1] - 1):
            logits = torch.from_numpy(generation.step(ids[:, t : t + 1]))
            for window, values in zip(block, logits, strict=True):
                yield window, t, values
