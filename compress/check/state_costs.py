"""What it costs to keep states in other formats, when a model decodes: measured against the same model with unrounded states.

The unrounded model runs once, in one pass, and what enters every layer waits on disk. Where the states of one layer are rounded,
that layer alone is decoded token by token; the layers above round nothing, so they run in one pass. Log-probabilities are
computed again from hidden states, a few rows at a time: no disk need hold the vocabulary.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from compress.check.metrics import WindowScores, score
from compress.model.hybrid import HybridModel
from compress.passes import Cost
from compress.recipe.check import DRIFT_FROM
from compress.runtime.inference import (
    Advance,
    Head,
    HiddenStates,
    LayerWeights,
    decode_layer,
    embed_windows,
    layer_weights,
    run_layer,
)
from compress.runtime.pieces import of_hidden
from compress.terminal import progress

ALONE, TOGETHER = "what states cost", "states together"  # stages


class Journal(Protocol):
    """What was measured, by what it was measured of; it outlives an interruption."""

    def get(self, key: str) -> Cost | None: ...

    def put(self, costs: dict[str, Cost]) -> None: ...


@dataclass
class _Sums:
    """Over scored positions; of the drift over the late ones."""

    divergence: float = 0.0
    positions: int = 0
    drift: float = 0.0
    late: int = 0

    def add(self, scores: WindowScores) -> None:
        late = scores.between(DRIFT_FROM, math.inf)
        self.divergence += float(scores.scores.kl_divergence.sum())
        self.positions += len(scores.scores.kl_divergence)
        self.drift += float((late.nll_candidate - late.nll_baseline).sum())
        self.late += len(late.kl_divergence)

    def cost(self) -> Cost:
        with np.errstate(over="ignore", invalid="ignore"):
            drift = float(np.exp(self.drift / self.late)) if self.late else None
        return Cost(self.divergence / self.positions, drift)


class StateCosts:
    """A `Finished`: the model as it was written, and calibration windows of which some have two tokens."""

    def __init__(
        self, model: HybridModel, unrounded: HybridModel, windows: list[torch.Tensor], folder: Path, device: str,
        journal: Journal,
    ):  # fmt: skip
        self.model, self.unrounded = model, unrounded
        self._windows, self._folder, self._device, self._journal = windows, folder, device, journal
        self._layers, self._tokens = model.config.num_hidden_layers, sum(map(len, windows))
        blank = HiddenStates(folder, windows, model.config.hidden_size)
        self._entering = [blank.at(folder / f"{index}") for index in range(self._layers + 1)]  # the last: the head
        self._is_run = False

    @torch.inference_mode()
    def alone(self, tried: Sequence[tuple[int, HybridModel]]) -> list[Cost]:
        new: dict[int, dict[str, HybridModel]] = {}
        for layer, model in tried:
            if self._journal.get(_key(model)) is None:
                new.setdefault(layer, {})[_key(model)] = model
        steps = sum(len(models) * self._steps(layer) for layer, models in new.items())
        with progress.task(ALONE, steps + (0 if self._is_run or not new else self._steps(0))) as advance:
            for layer, models in new.items():
                self._run_once(advance)
                self._measure_layer(layer, models, advance)
        return [self._known(model) for _, model in tried]

    @torch.inference_mode()
    def together(self, tried: HybridModel) -> Cost:
        if self._journal.get(_key(tried)) is None:
            first = 0 if self._is_run else self._steps(0)
            with progress.task(TOGETHER, first + self._steps(0)) as advance:
                self._run_once(advance)
                work = self._entering[0].at(self._folder / "work")
                embed_windows(tried, self._windows, work)
                for index in range(self._layers):
                    self._decode(tried, index, layer_weights(tried, index, self._device), work, work, advance)
                self._score({_key(tried): work}, advance)
        return self._known(tried)

    def _measure_layer(self, index: int, models: dict[str, HybridModel], advance: Advance) -> None:
        """Side by side: the weights of every layer above are read once."""
        works = {key: self._entering[0].at(self._folder / f"work-{number}") for number, key in enumerate(models)}
        weights = layer_weights(self.unrounded, index, self._device)
        for key, model in models.items():
            self._decode(model, index, weights, self._entering[index], works[key], advance)
        for above in range(index + 1, self._layers):
            weights = layer_weights(self.unrounded, above, self._device)
            for work in works.values():
                run_layer(self.unrounded, above, weights, work, work, self._device, advance)
        self._score(works, advance)

    def _decode(self, model: HybridModel, index: int, weights: LayerWeights, entering: HiddenStates,
                leaving: HiddenStates, advance: Advance) -> None:  # fmt: skip
        """A layer that remembers nothing gives the same in one pass."""
        run = decode_layer if model.layer(index).states else run_layer
        run(model, index, weights, entering, leaving, self._device, advance)

    def _run_once(self, advance: Advance) -> None:
        if self._is_run:
            return
        embed_windows(self.unrounded, self._windows, self._entering[0])
        for index, (entering, leaving) in enumerate(zip(self._entering, self._entering[1:], strict=False)):
            weights = layer_weights(self.unrounded, index, self._device)
            run_layer(self.unrounded, index, weights, entering, leaving, self._device, advance)
        advance(self._tokens)  # as `_steps` counts the head
        self._is_run = True

    def _score(self, leaving: dict[str, HiddenStates], advance: Advance) -> None:
        """Notes the cost of each, from the states that enter the head."""
        head, sums = Head(self.unrounded, self._device), {key: _Sums() for key in leaving}
        for number, block in enumerate(self._entering[-1].blocks):
            plain = self._entering[-1].read(number)
            for key, work in leaving.items():
                for window, ours, theirs in zip(block, plain, work.read(number), strict=True):
                    for scores in self._scores(head, self._windows[window], ours, theirs):
                        sums[key].add(scores)
                advance(plain.shape[0] * plain.shape[1])
        self._journal.put({key: found.cost() for key, found in sums.items()})

    def _scores(
        self, head: Head, window: torch.Tensor, unrounded: torch.Tensor, rounded: torch.Tensor
    ) -> Iterator[WindowScores]:
        """Of one window [S] from both final states [S, H], in pieces; nothing follows its last token."""
        both = (of_hidden(head, 0, states.to(self._device)) for states in (unrounded, rounded))
        for (_, start, log_p), (_, _, logits) in zip(*both, strict=True):
            targets = window[start + 1 : start + len(logits) + 1]
            yield WindowScores(start + 1, score(torch.log_softmax(log_p, dim=-1), logits, targets))

    def _steps(self, first: int) -> int:
        """Tokens x layers from one on, the head counted as one."""
        return self._tokens * (self._layers - first + 1)

    def _known(self, model: HybridModel) -> Cost:
        found = self._journal.get(_key(model))
        assert found is not None, "it was measured just now"
        return found


def _key(model: HybridModel) -> str:
    """How the states of a model are kept: of one checkpoint, that says all."""
    kept = json.dumps([state.model_dump(mode="json") for state in model.config.compress.states])
    return hashlib.sha256(kept.encode()).hexdigest()[:32]
