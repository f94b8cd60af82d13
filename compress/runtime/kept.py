"""What layers keep at the end of a call, for whoever looks at it while a model runs: our own forward, or a graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from compress.model.block import Layer
from compress.runtime.eager import Eager, Weights


@dataclass(frozen=True)
class Kept:
    """What one layer keeps of some windows of equal length. The tensors may be gone when the listener returns."""

    layer: Layer
    windows: Sequence[int]  # which ones, a row of every state each
    read: int  # tokens of each of them, so far
    length: int  # tokens of each of them, in all
    stored: Mapping[str, torch.Tensor]  # [B, ...] by name, in the type they are stored in
    scales: Weights  # the layer's weights, of which static scales are some

    def begun_with(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the next call of these rows would begin with, float32, by name."""
        chosen = {name: tensor[list(rows)] for name, tensor in self.stored.items()}
        return self.layer.restored(Eager(self.scales), chosen)


Listen = Callable[[Kept], None]
