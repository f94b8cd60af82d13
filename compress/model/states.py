"""What a layer remembers, as data: the empty past, bytes, graph inputs and outputs, and runtimes' settings all follow from it.

**When a state is rounded.** Arithmetic is in float32. At the end of every call (a prompt, a piece of one, a decoded token) what
the next call needs is stored once, in the precision of its `StateSpec`; the next call begins with what was stored. Of a state
that grows, only the entries of the new tokens are stored; the others stay as they are. `Operators.state_out` is the one place.

A state may be carried in several tensors (`StateSpec.parts`): beside itself what rounding lost, and the inputs of the tokens
since it was rounded (`carrying.py`).
"""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from compress.formats import remembered
from compress.formats.remembered import Precision


class StateKind(StrEnum):
    SSM = "ssm_state"
    CONV = "conv_state"
    KV = "kv_cache"


# the axis, from the end, whose entries share a scale: d_state, so that each channel has its own; else the last
SCALE_AXES = {StateKind.SSM: -2, StateKind.CONV: -1, StateKind.KV: -1}
D_INNER = -1  # of a recurrent state, where asked for: its channels (in Mamba-2 those of a head)

IN_FLOAT32, OF_INPUTS = Precision(), Precision("fp16")


@dataclass(frozen=True)
class StateSpec:
    """One tensor that a layer carries from call to call; a layer may have several of a kind.

    `shape` is that of one sequence, without the batch. A state that grows has a place for every token along the axis `grows`
    (of that shape), and 0 there when nothing was read. `inputs`: of a recurrent state, how many numbers its scan takes of a
    token, c aside.
    """

    name: str  # as onnxruntime-genai has it: key, value, conv_state, recurrent_state
    kind: StateKind
    shape: tuple[int, ...]
    grows: int | None = None
    precision: Precision = IN_FLOAT32
    inputs: int = 0

    def kept_in(self, precision: Precision) -> "StateSpec":
        return replace(self, precision=precision)

    @property
    def residual(self) -> "StateSpec | None":
        """What rounding lost, where that is kept."""
        kept = self.precision.of_residual()
        return None if kept is None else StateSpec(self._beside("residual"), self.kind, self.shape, precision=kept)

    @property
    def recent(self) -> "StateSpec | None":
        """The inputs of the tokens since the state was rounded, in order of time, where not every token rounds it; zeros where
        there was no token."""
        if self.precision.every == 1:
            return None
        shape = (self.precision.every - 1, self.inputs)
        return StateSpec(self._beside("inputs"), self.kind, shape, precision=OF_INPUTS)

    def _beside(self, what: str) -> str:
        return f"{self.name.removesuffix('_state')}_{what}"

    @property
    def parts(self) -> tuple["StateSpec", ...]:
        """The tensors it is carried in."""
        return tuple(part for part in (self, self.residual, self.recent) if part is not None)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """As it is kept between calls."""
        return self.precision.stored_shape(self.shape)

    @property
    def scale_name(self) -> str:
        """Of the tensor with static scales, within the layer."""
        return f"states.{self.name}.scale"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Of static scales; those of a cache are the same for every token."""
        shape = tuple(1 if axis == self.grows else size for axis, size in enumerate(self.shape))
        return self.precision.scale_shape(shape)

    def sized(self, batch: int, tokens: int = 0) -> tuple[int, ...]:
        """Its stored shape for a batch that has read so many tokens."""
        return (batch, *(tokens if axis == self.grows else size for axis, size in enumerate(self.stored_shape)))

    def empty(self, batch: int, device: str | torch.device = "cpu") -> torch.Tensor:
        """The past before the first token, as stored: zeros."""
        return torch.zeros(self.sized(batch), dtype=self.precision.dtype, device=device)

    def elements(self, tokens: int = 1) -> int:
        """Of one sequence; of one that grows, after so many tokens."""
        return torch.Size(
            (1, *(tokens if axis == self.grows else size for axis, size in enumerate(self.shape)))
        ).numel()

    def bytes(self, tokens: int = 1) -> int:
        """Of one sequence as it is stored, scales and all parts included; of one that grows, after so many tokens."""
        return sum(torch.Size(part.sized(1, tokens)).numel() * part.precision.dtype.itemsize for part in self.parts)

    def why_unfit(self, precision: Precision) -> str | None:
        """What keeps this state from being kept so, or None. (A convolution's few entries a channel would pay two more for a
        dynamic scale, and be rounded anew at every step.)"""
        most = self.shape[precision.axis]
        if self.kind == StateKind.CONV and not precision.is_plain and not precision.has_static_scale:
            return f"a conv_state has {most} entries for a scale: {precision.format} needs scale: static"
        if precision.block is not None and precision.block > most:
            return f"block is {precision.block}, but {most} entries stand along the axis of {self.name}'s scales"
        if precision.every > 1 and not self.inputs:
            return f"every is {precision.every}, but this model does not say which inputs {self.name} is made of"
        return None

    def restored(self, stored: torch.Tensor, scales: torch.Tensor | None = None) -> torch.Tensor:
        """float32, as arithmetic takes it."""
        return remembered.decode(stored, self.precision, self.shape[self.precision.axis], scales)

    def stored(
        self,
        value: torch.Tensor,
        kept: torch.Tensor,
        positions: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As it is kept between calls: `value` [B, ...] after this call, what was `kept` before it; positions [B, T] of all
        tokens (`tokens_read`; that of the last token is the state's), which only stochastic rounding asks for."""
        if self.grows is None:
            return self.encoded(value, positions, scales)
        axis = self.grows + 1
        past = kept.shape[axis]
        new = value.narrow(axis, past, value.shape[axis] - past)
        return torch.cat([kept, self.encoded(new, positions, scales)], axis)

    def encoded(
        self, value: torch.Tensor, positions: torch.Tensor | None = None, scales: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The state [B, ...], or of one that grows the entries of the last tokens, as `stored` keeps them."""
        position = None
        if self.precision.rounding == "stochastic":
            assert positions is not None, f"{self.name}: the dither is that of a position"
            new = 1 if self.grows is None else value.shape[self.grows + 1]
            sizes = [-1, *(new if axis == self.grows else 1 for axis in range(len(self.shape)))]
            position = positions[:, -new:].reshape(sizes)
        return remembered.encode(value, self.precision, position, scales)


def tokens_read(mask: torch.Tensor | None, total: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Real tokens up to each token, itself included: [B, T] of a mask [B, T], or [1, total] where there is no padding."""
    return torch.arange(1, total + 1, device=device)[None] if mask is None else mask.long().cumsum(1)


def due(read: torch.Tensor, new: int, every: int) -> torch.Tensor:
    """Which rows [B] have their states rounded at the end of a call: those that read several tokens in it, and those that read
    one and have now read a multiple of `every`. Only real tokens count, so padding and other rows change nothing.

    `read` [B, T]: real tokens up to each token; `new`: the last places, those of this call."""
    now, tokens = read[:, -1], read_now(read, new)
    return (tokens > 1) | ((tokens == 1) & (now % every == 0))


def read_now(read: torch.Tensor, new: int) -> torch.Tensor:
    """Real tokens of each row in this call, [B]."""
    return read[:, -1] - read[:, -1 - new] if read.shape[1] > new else read[:, -1]
