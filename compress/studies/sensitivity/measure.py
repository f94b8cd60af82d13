"""The mean KL divergence that altering one unit costs, from stored states: only what comes after it is computed again."""

from dataclasses import replace

import numpy as np
import torch

from compress.check.metrics import score
from compress.model.hybrid import HybridModel
from compress.runtime.inference import Advance, Head, HiddenStates, embed_windows, layer_weights, run_layer
from compress.studies.sensitivity.cells import Cell, Key
from compress.studies.sensitivity.original import Original, logits
from compress.terminal import progress


class Measure:
    """Measures cells, each once. One layer's weights are in memory at a time."""

    def __init__(self, model: HybridModel, originals: list[Original], device: str):
        self._model, self._originals, self._device = model, originals, device
        self._tokens = sum(original.prompt_set.tokens for original in originals)
        self._known: dict[Key, float] = {}

    def all(self, cells: list[Cell], what: str) -> list[float]:
        """Mean KL divergence of each cell, nats per token."""
        new = {cell.key: cell for cell in cells if cell.key not in self._known}
        with progress.task(what, sum(map(self._steps, new.values()))) as advance:
            for key, cell in new.items():
                self._known[key] = self._divergence(cell, advance)
        return [self._known[cell.key] for cell in cells]

    def _first_layer(self, cell: Cell) -> int:
        """The first layer to compute again; the number of layers where it is the head alone."""
        order = [unit.name for unit in self._model.units]
        return max(0, order.index(cell.unit.name) - 1)

    def _steps(self, cell: Cell) -> int:
        """Tokens x layers, the head counted as one."""
        return self._tokens * (self._model.config.num_hidden_layers - self._first_layer(cell) + 1)

    @torch.inference_mode()
    def _divergence(self, cell: Cell, advance: Advance) -> float:
        altered = cell.altered()
        units = tuple(altered if unit.name == altered.name else unit for unit in self._model.units)
        model, first = replace(self._model, units=units), self._first_layer(cell)
        states = [original.entering[first] for original in self._originals]
        if altered.name == self._model.units[0].name:
            states = [self._embedded(model, original) for original in self._originals]
        for index in range(first, model.config.num_hidden_layers):
            weights = layer_weights(model, index, self._device)
            for original, entering in zip(self._originals, states, strict=True):
                run_layer(model, index, weights, entering, original.work, self._device, advance)
            states = [original.work for original in self._originals]
        return self._mean(Head(model, self._device), states, advance)

    def _embedded(self, model: HybridModel, original: Original) -> HiddenStates:
        embed_windows(model, original.prompt_set.windows, original.work)
        return original.work

    def _mean(self, head: Head, states: list[HiddenStates], advance: Advance) -> float:
        """Over all scored positions of all prompt sets."""
        found = []
        for original, leaving in zip(self._originals, states, strict=True):
            for window, start, rows in logits(leaving, head, self._device):
                stop = start + len(rows)
                targets = original.prompt_set.windows[window][start + 1 : stop + 1]
                found.append(score(original.log_probs(window, start, stop), rows, targets).kl_divergence)
            advance(original.prompt_set.tokens)
        return float(np.concatenate(found).mean())
