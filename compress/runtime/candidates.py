"""Candidates: whatever gives logits for windows of tokens, in one pass (`prefill`) or token by token (`decode`).

Decoding may begin after a prompt: the first `prefill` tokens of each window in one call, whose logits are not asked for.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from compress.disk import cache
from compress.model.hybrid import HybridModel
from compress.recipe.check import PHASES as PHASES
from compress.runtime.graph_states import GraphStates
from compress.runtime.inference import Advance, Cuts, Head, blocks_of, kept_bytes, stream
from compress.runtime.kept import Listen
from compress.runtime.onnx_session import Generation, OnnxSession
from compress.runtime.pieces import PIECE_BYTES, Piece, cut, of_hidden, rows_within

LOGIT_BYTES = 64 << 20  # of the logits of windows that run side by side; a long one alone is read call by call
DECODE_BATCH = 48  # windows decoded side by side, where their states fit: a step costs little more for more of them

Tell = Callable[[Generation, int], None]


class Candidate(Protocol):
    vocab_size: int

    def logits(self, windows: list[torch.Tensor], phase: str, advance: Advance) -> Iterator[Piece]:
        """The logits of every position but the last of each window, in pieces in any order; in decode, of those after the
        prompt."""

    def steps(self, tokens: int) -> int:
        """How far `advance` counts over this many tokens."""


class StatefulCandidate(Candidate, Protocol):
    """One whose states can be looked at."""

    def logits(
        self, windows: list[torch.Tensor], phase: str, advance: Advance, listen: Listen | None = None
    ) -> Iterator[Piece]:
        """As above; in decode, `listen` hears of what layers keep at the end of each call."""

    def remember(self, windows: list[torch.Tensor], cuts: Cuts, advance: Advance, listen: Listen) -> None:
        """Reads the windows, in calls as `cuts` says, for `listen` alone."""


class Overheard:
    """A candidate that tells a listener of its states while it decodes."""

    def __init__(self, candidate: StatefulCandidate, listen: Listen):
        self._candidate, self._listen, self.vocab_size = candidate, listen, candidate.vocab_size

    def steps(self, tokens: int) -> int:
        return self._candidate.steps(tokens)

    def logits(self, windows: list[torch.Tensor], phase: str, advance: Advance) -> Iterator[Piece]:
        return self._candidate.logits(windows, phase, advance, self._listen)


class CheckpointCandidate:
    """A checkpoint folder through our own forward, layer by layer: it may be larger than memory."""

    def __init__(self, model: HybridModel, device: str = "cpu", prefill: int = 0):
        self._model, self._device, self.vocab_size = model, device, model.config.vocab_size
        self._prefill = prefill

    def steps(self, tokens: int) -> int:
        return tokens * self._model.config.num_hidden_layers

    def logits(
        self, windows: list[torch.Tensor], phase: str, advance: Advance, listen: Listen | None = None
    ) -> Iterator[Piece]:
        head, decode = None, phase == "decode"
        first = self._prefill if decode else 0
        with cache.scratch("candidate") as scratch:
            for block, hidden in stream(
                self._model, windows, scratch, device=self._device, decode=decode, prefill=first, advance=advance,
                listen=listen if decode else None,
            ):  # fmt: skip
                head = head or Head(self._model, self._device, kept_bytes(self._device))  # after the layers are done
                for window, states in zip(block, hidden, strict=True):
                    yield from of_hidden(head, window, states, first)

    def remember(self, windows: list[torch.Tensor], cuts: Cuts, advance: Advance, listen: Listen) -> None:
        with cache.scratch("candidate") as scratch:
            for _ in stream(
                self._model, windows, scratch, device=self._device, advance=advance, cuts=cuts, listen=listen
            ):
                pass


class OnnxCandidate:
    """An exported model.onnx under onnxruntime, with the session options a user gets by default unless others are given."""

    def __init__(self, path: Path, options: dict[str, str] | None = None, prefill: int = 0):
        self._path, self._session, self._prefill = path, OnnxSession(path, options), prefill
        self._states: GraphStates | None = None  # read from the file when they are asked for
        self.vocab_size = self._session.vocab_size

    def steps(self, tokens: int) -> int:
        return tokens

    def logits(
        self, windows: list[torch.Tensor], phase: str, advance: Advance, listen: Listen | None = None
    ) -> Iterator[Piece]:
        for block in blocks_of(windows, self._tokens(max(map(len, windows)), phase)):
            ids = torch.stack([windows[i] for i in block]).numpy()
            tell = self._telling(block, ids, listen)
            yield from self._decode(block, ids, tell) if phase == "decode" else self._in_one_pass(block, ids)
            advance(ids.size)

    def remember(self, windows: list[torch.Tensor], cuts: Cuts, advance: Advance, listen: Listen) -> None:
        for block in blocks_of(windows, self._tokens(max(map(len, windows)), "prefill")):
            ids = torch.stack([windows[i] for i in block]).numpy()
            generation, tell = self._session.start(len(ids)), self._telling(block, ids, listen)
            for start, stop in cuts(ids.shape[1]):
                generation.read(ids[:, start:stop])
                tell(generation, stop)
            advance(ids.size)

    def _telling(self, block: list[int], ids: np.ndarray, listen: Listen | None) -> Tell:
        """Tells `listen` of a generation that has read so many tokens of these windows."""
        if listen is None:
            return lambda generation, read: None
        if self._states is None:
            self._states = GraphStates(self._path, self._session)
        states = self._states

        def tell(generation: Generation, read: int) -> None:
            for kept in states.kept(generation, block, read, ids.shape[1]):
                listen(kept)

        return tell

    def _tokens(self, longest: int, phase: str) -> int:
        """In windows that run together: a call gives the logits of all its tokens."""
        at_once = LOGIT_BYTES // (4 * self.vocab_size)
        if phase == "prefill":
            return max(longest, at_once)
        states = 2 * self._session.state_bytes(longest)  # before a step and after it
        fitting = kept_bytes("cpu") // max(1, states)
        return longest * max(1, min(DECODE_BATCH, at_once // max(1, self._prefill), fitting))

    def _in_one_pass(self, block: list[int], ids: np.ndarray) -> Iterator[Piece]:
        generation, scored = self._session.start(len(ids)), ids.shape[1] - 1
        for start, stop in generation.calls(ids.shape[1]):
            yield from _pieces(block, start, generation.step(ids[:, start:stop])[:, : scored - start])

    def _decode(self, block: list[int], ids: np.ndarray, tell: Tell) -> Iterator[Piece]:
        """After the prompt, the logits of some steps at a time."""
        generation, scored = self._session.start(len(ids)), ids.shape[1] - 1
        prompt = min(self._prefill, scored)
        if prompt:
            generation.read(ids[:, :prompt])
            tell(generation, prompt)
        together = rows_within(PIECE_BYTES // len(ids), self.vocab_size)
        for start in range(prompt, scored, together):
            stop = min(start + together, scored)
            logits = np.empty((len(ids), stop - start, self.vocab_size), np.float32)
            for t in range(start, stop):
                logits[:, t - start : t - start + 1] = generation.step(ids[:, t : t + 1])
                tell(generation, t + 1)
            yield from _pieces(block, start, logits)


def _pieces(block: list[int], first: int, logits: np.ndarray) -> Iterator[Piece]:
    """The logits [B, n, V] of consecutive positions of some windows."""
    for window, values in zip(block, torch.from_numpy(logits), strict=True):
        yield from cut(window, first, values)
