"""The operators of blocks computed with torch, one layer at a time."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from compress.arithmetic.attention import attention, rotated
from compress.arithmetic.convolution import causal_conv, last_token
from compress.arithmetic.mixture import mixture
from compress.arithmetic.norm import rms_norm
from compress.arithmetic.selective_scan import selective_scan
from compress.arithmetic.ssd import ssd_scan
from compress.model import routing, states
from compress.model.operators import Operators
from compress.model.routing import Router
from compress.model.states import StateSpec

Tensor = torch.Tensor


class Weights(Protocol):
    """A layer's weights as its arithmetic sees them, by name within the layer."""

    def __call__(self, name: str) -> Tensor:
        """The tensor as float32."""

    def linear(self, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the transpose of the matrix [N, K]; the input is rounded first where it is stored so."""


class Eager(Operators[Tensor]):
    """`mask` [B, T] is 1 for tokens and 0 for padding, or None where there is none; then `total` is T, which only states
    ask for that are rounded with a dither or every so many tokens. `only` limits mixtures to some experts, to look
    at what reaches them."""

    def __init__(self, weights: Weights, mask: Tensor | None = None, only: set[int] | None = None, total: int = 0):
        self.weights, self._mask, self._only, self._total = weights, mask, only, total

    def linear(self, name: str, x: Tensor, bias: str | None = None) -> Tensor:
        return self.weights.linear(name, x, None if bias is None else self.weights(bias))

    def rms_norm(self, x: Tensor, name: str, eps: float, groups: int = 1) -> Tensor:
        return rms_norm(x, self.weights(name), eps, groups)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def subtract(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return x * factor

    def silu(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def squared_relu(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()

    def softplus(self, x: Tensor) -> Tensor:
        return F.softplus(x)

    def add_weight(self, x: Tensor, name: str) -> Tensor:
        return x + self.weights(name)

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return torch.split(x, list(sizes), dim=-1)

    def causal_conv(self, x: Tensor, state: Tensor, weight: str, bias: str | None) -> tuple[Tensor, Tensor]:
        kernel, shift = self.weights(weight), None if bias is None else self.weights(bias)
        return causal_conv(self._without_padding(x), state, kernel, shift, self._new(x))

    def selective_scan(
        self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, a_log: str, d: str,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        a, skip = -torch.exp(self.weights(a_log)).T, self.weights(d)
        if earlier is not None:
            ex, edt, eb = _joined_as(earlier, x, dt, b)
            state = selective_scan(ex, edt, a, eb, eb, skip, state)[1]
        return selective_scan(x, self._without_padding(dt), a, b, c, skip, state)

    def ssd(
        self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, a_log: str, d: str,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        a, skip = -torch.exp(self.weights(a_log)), self.weights(d)
        by_head, by_group = (len(a), -1), (-1, state.shape[2])
        if earlier is not None:
            ex, edt, eb = _joined_as(earlier, x, dt, b)
            ex, eb = ex.unflatten(2, by_head), eb.unflatten(2, by_group)
            state = ssd_scan(ex, edt, a, eb, eb, skip, state)[1]
        heads, b, c = x.unflatten(2, by_head), b.unflatten(2, by_group), c.unflatten(2, by_group)
        y, state = ssd_scan(heads, self._without_padding(dt), a, b, c, skip, state)
        return y.flatten(2), state

    def last_inputs(self, x: Tensor, dt: Tensor, b: Tensor) -> Tensor:
        new = self._new(x)
        if new is None:
            return torch.cat([each[:, -1:] for each in (x, dt, b)], -1)
        last = last_token(new).sub(1).clamp_min(0)
        rows = torch.arange(len(x), device=x.device)
        return torch.cat([each[rows, last] for each in (x, dt, b)], -1)[:, None]

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, rotary: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (x.unflatten(2, (-1, past_key.shape[3])).transpose(1, 2) for x in (query, key, value))
        if rotary is not None:
            positions = self._positions(query.shape[0], past_key.shape[2], query.shape[2], query.device)
            query, key = rotated(query, positions, rotary), rotated(key, positions, rotary)
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        return self._mixed(query, key, value).transpose(1, 2).flatten(2), key, value

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, Q, S, P], key and value [B, G, T, P], turned by their positions -> [B, Q, S, P]."""
        return attention(query, key, value, self._mask)

    def mixture(
        self, x: Tensor, rows: Tensor, router: Router, experts: int, run: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        return mixture(rows, self.gates(x, router, experts), run, self._only)

    def gates(self, x: Tensor, router: Router, experts: int) -> Tensor:
        """x [..., H] -> [..., E]."""
        bias = None if router.bias is None else self.weights(router.bias)
        return router.gates(self.router_logits(x, router), experts, bias)

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        """x [..., H] -> [..., R]."""
        return routing.logits(x, self.weights(router.weight))

    def state_in(self, spec: StateSpec, stored: Tensor) -> Tensor:
        return spec.restored(stored, self._scales(spec))

    def state_out(self, spec: StateSpec, value: Tensor, kept: Tensor, due: Tensor | None = None) -> Tensor:
        positions = self._read(value) if spec.precision.rounding == "stochastic" else None
        stored = spec.stored(value, kept, positions, self._scales(spec))
        return stored if due is None else torch.where(due.view(-1, *[1] * len(spec.shape)), stored, kept)

    def due(self, given: Tensor, every: int) -> Tensor:
        return states.due(self._read(given), given.shape[1], every)

    def inputs_out(self, value: Tensor, kept: Tensor, given: Tensor, every: int) -> Tensor:
        read, slots = self._read(given), torch.arange(every - 1, device=kept.device)
        place = (read[:, -1] - 1) % every
        is_new = (slots == place[:, None]) & (states.read_now(read, given.shape[1]) > 0)[:, None]
        most = torch.finfo(kept.dtype).max
        with_new = torch.where(is_new[..., None], value.clamp(-most, most).to(kept.dtype), kept)
        return torch.where(self.due(given, every)[:, None, None], 0, with_new)

    def _scales(self, spec: StateSpec) -> Tensor | None:
        return self.weights(spec.scale_name) if spec.precision.has_static_scale else None

    def _read(self, like: Tensor) -> Tensor:
        """Real tokens read up to each token, itself included, [B, T] or [1, T]."""
        return states.tokens_read(self._mask, max(1, self._total), like.device)

    def _new(self, x: Tensor) -> Tensor | None:
        """The mask of the new tokens, [B, S]."""
        return None if self._mask is None else self._mask[:, -x.shape[1] :].to(x.dtype)

    def _without_padding(self, x: Tensor) -> Tensor:
        """x [B, S, D], zero at padding."""
        new = self._new(x)
        return x if new is None else x * new[:, :, None]

    def _positions(self, batch: int, past: int, length: int, device: torch.device) -> Tensor:
        """Of the new tokens among the real ones, [B, S]; 0 at padding in front."""
        read = states.tokens_read(self._mask, past + length, device)[:, -length:]
        return (read - 1).clamp_min(0).expand(batch, -1)


def _joined_as(joined: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """Tensors [B, tokens, ...] that stand side by side in one, each as wide as one of `parts`."""
    return torch.split(joined, [part.shape[2] for part in parts], 2)
