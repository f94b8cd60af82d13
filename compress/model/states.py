"""What a layer remembers, as data: the empty past, bytes, graph inputs and outputs, and runtimes' settings all follow from it."""

from dataclasses import dataclass
from enum import StrEnum

import torch

from compress.model.weight import PLAIN_DTYPES


class StateKind(StrEnum):
    SSM = "ssm_state"
    CONV = "conv_state"
    KV = "kv_cache"


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a layer carries from call to call; a layer may have several of a kind.

    `shape` is that of one sequence, without the batch. A state that grows has a place for every token along the axis `grows`
    (of that shape), and 0 there when nothing was read. `format` is the type it is kept in between calls.
    """

    name: str  # as onnxruntime-genai has it: key, value, conv_state, recurrent_state
    kind: StateKind
    shape: tuple[int, ...]
    grows: int | None = None
    format: str = "fp32"

    def sized(self, batch: int, tokens: int = 0) -> tuple[int, ...]:
        """Its shape for a batch that has read so many tokens."""
        return (batch, *(tokens if axis == self.grows else size for axis, size in enumerate(self.shape)))

    def empty(self, batch: int, device: str | torch.device = "cpu") -> torch.Tensor:
        """The past before the first token."""
        return torch.zeros(self.sized(batch), dtype=PLAIN_DTYPES[self.format], device=device)

    def elements(self, tokens: int = 1) -> int:
        """Of one sequence; of one that grows, after so many tokens."""
        return torch.Size(self.sized(1, tokens)).numel()

    def stored(self, value: torch.Tensor) -> torch.Tensor:
        """As it is kept between calls."""
        return value.to(PLAIN_DTYPES[self.format])
