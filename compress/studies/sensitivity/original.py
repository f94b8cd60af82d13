"""The model as it came, on one prompt set: what enters every layer, on disk, and what comes out, computed once."""

from collections.abc import Iterator
from pathlib import Path

import torch

from compress.check import baseline
from compress.model.hybrid import HybridModel
from compress.prompts import PromptSet
from compress.runtime.inference import Advance, Head, HiddenStates, embed_windows, layer_weights, run_layer
from compress.runtime.pieces import Piece, of_hidden
from compress.terminal import progress


class Original:
    """Float hidden states entering every layer and the head, and log-probabilities; a `Candidate` of the check.

    One pass over the model gives both. Where the cache has the log-probabilities already, the pass ends before the head.
    """

    def __init__(self, model: HybridModel, prompt_set: PromptSet, model_sha256: str, folder: Path, device: str):
        self._model, self._device, self.prompt_set = model, device, prompt_set
        self.vocab_size = model.config.vocab_size
        layers = model.config.num_hidden_layers
        blocks = HiddenStates(folder, prompt_set.windows, model.config.hidden_size)
        self.entering = [blocks.at(folder / f"{index}") for index in range(layers + 1)]  # the last enters the head
        self.work = blocks.at(folder / "work")  # of the altered model
        self._is_recorded = False
        self.log_probs = baseline.compute(self, model_sha256, prompt_set).log_probs
        if not self._is_recorded:
            with progress.task(f"hidden states of {prompt_set.name}", self.steps(prompt_set.tokens)) as advance:
                self._record(advance)

    def steps(self, tokens: int) -> int:
        return tokens * self._model.config.num_hidden_layers

    def logits(self, windows: list[torch.Tensor], phase: str, advance: Advance) -> Iterator[Piece]:
        """Of the prompt set's own windows in prefill: all that a baseline asks for."""
        self._record(advance)
        return logits(self.entering[-1], Head(self._model, self._device), self._device)

    @torch.inference_mode()
    def _record(self, advance: Advance) -> None:
        embed_windows(self._model, self.prompt_set.windows, self.entering[0])
        for index, (entering, leaving) in enumerate(zip(self.entering, self.entering[1:], strict=False)):
            weights = layer_weights(self._model, index, self._device)
            run_layer(self._model, index, weights, entering, leaving, self._device, advance)
        self._is_recorded = True


def bytes_needed(model: HybridModel, sets: list[PromptSet]) -> int:
    """On disk: float32 states before every layer, before the head and of the altered model, and log-probabilities."""
    tokens, config = sum(prompt_set.tokens for prompt_set in sets), model.config
    states = 4 * tokens * config.hidden_size * (config.num_hidden_layers + 2)
    return states + baseline.bytes_needed(tokens, config.vocab_size)


def logits(states: HiddenStates, head: Head, device: str) -> Iterator[Piece]:
    """The logits of every position but the last of each window, in pieces."""
    for number, block in enumerate(states.blocks):
        for window, hidden in zip(block, states.read(number).to(device), strict=True):
            yield from of_hidden(head, window, hidden)
