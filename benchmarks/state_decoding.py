"""What a layer gives when its tokens are decoded one by one and its states rounded, at the cost of a prefill and a loop over the
states alone.

Only a recurrent state needs the loop. A KV entry and an input of a convolution are rounded once, when they are stored, whatever
comes later: attention and convolution see them through that rounding, and the newest token's own as computed. So each operator
over time takes all tokens at once here and gives what calls of one token would. `state_study.py --agree` compares with
`stream(..., decode=True)`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.arithmetic.attention import rotated
from compress.formats import remembered
from compress.formats.remembered import Precision
from compress.model.block import Layer
from compress.model.hybrid import HybridModel
from compress.model.states import StateSpec
from compress.runtime.eager import Eager
from compress.runtime.inference import empty_state, layer_weights

torch._dynamo.config.recompile_limit = 4096  # a shape or a precision each
QUERIES = 128  # of attention at once: their scores are [B, Q, QUERIES, T]
BY_POSITION, _, PERIOD = remembered.STEPS


class Tokens(NamedTuple):
    """What a scan takes of each token [B, S, ...]: h = exp(steps a) h + b (outer) fed, y = c . h + skip."""

    steps: Tensor  # [B, S, 1, D], in Mamba-2 [B, S, heads, 1, 1]
    fed: Tensor  # [B, S, D] or [B, S, heads, P]
    b: Tensor  # [B, S, N] or [B, S, heads, N]
    c: Tensor
    skip: Tensor  # as fed

    def at(self, t: int) -> "Tokens":
        return Tokens(*(x[:, t] for x in self))


Hear = Callable[[int, Tokens, Tensor], None]


@torch.compile(dynamic=False)
def step(state: Tensor, a: Tensor, token: Tokens) -> tuple[Tensor, Tensor]:
    """One token: y, and the state after it."""
    state = torch.exp(token.steps * a) * state + token.b[..., None] * token.fed[..., None, :]
    return (token.c[..., None] * state).sum(-2) + token.skip, state


def rounded(
    value: Tensor, precision: Precision, residual: Precision | None, position: Tensor, scales: Tensor | None
) -> Tensor:
    """A state as the next call sees it."""
    size = value.shape[precision.axis]
    seen = remembered.decode(remembered.encode(value, precision, position, scales), precision, size, scales)
    if residual is None:
        return seen
    return seen + remembered.decode(remembered.encode(value - seen, residual, position), residual, size)


rounded_at_once = torch.compile(rounded, dynamic=False)


class Decoding(Eager):
    """One layer's operators. The first `prefill` tokens are one call. `hear(t, token, state)` is told of the recurrent state
    before it is rounded, after token t."""

    def __init__(self, weights, layer: Layer, prefill: int = 1, hear: Hear | None = None):
        super().__init__(weights)
        self._specs = {spec.name: spec for spec in layer.states}
        self._prefill, self._hear = prefill, hear

    def state_in(self, spec: StateSpec, stored: Tensor) -> Tensor:
        return torch.zeros(stored.shape[0], *spec.shape)

    def state_out(self, spec: StateSpec, value: Tensor, kept: Tensor, due: Tensor | None = None) -> Tensor:
        return kept  # rounded already, where it is made

    def selective_scan(self, x, dt, b, c, state, a_log, d, earlier=None):
        a, scan = -torch.exp(self.weights(a_log)).T, super().selective_scan

        def tokens(x: Tensor, dt: Tensor, b: Tensor) -> Tokens:
            return Tokens(dt[:, :, None], dt * x, b, c, self.weights(d) * x)

        return self._by_call(lambda *prompt: scan(*prompt, state, a_log, d), (x, dt, b, c), tokens, state, a)

    def ssd(self, x, dt, b, c, state, a_log, d, earlier=None):
        a, scan = -torch.exp(self.weights(a_log)), super().ssd
        heads, width = len(a), state.shape[2]

        def by_head(matrix: Tensor) -> Tensor:
            groups = matrix.unflatten(2, (-1, width))
            return groups.repeat_interleave(heads // groups.shape[2], 2)

        def tokens(x: Tensor, dt: Tensor, b: Tensor) -> Tokens:
            x = x.unflatten(2, (heads, -1))
            return Tokens(dt[..., None, None], dt[..., None] * x, by_head(b), by_head(c), self.weights(d)[:, None] * x)

        return self._by_call(
            lambda *prompt: scan(*prompt, state, a_log, d), (x, dt, b, c), tokens, state, a[:, None, None]
        )

    def _by_call(self, scan, inputs: tuple[Tensor, ...], tokens: Callable[..., Tokens], state: Tensor, a: Tensor):
        """A scan whose state is kept, and rounded, from call to call."""
        spec, length = self._specs["recurrent_state"], inputs[0].shape[1]
        if spec.precision.format == "fp32" and self._hear is None:
            return scan(*inputs)
        outputs, first = [], self._prefill if self._prefill > 1 else 0
        if first:
            y, state = scan(*(x[:, :first] for x in inputs))
            outputs, state = [y], self._kept(spec, state, first)
        x, dt, b, _ = inputs
        exact = narrow = tokens(x, dt, b)
        if spec.precision.every > 1:
            narrow = tokens(*(each.half().float() for each in (x, dt, b)))
        for t in range(first, length):
            y, after = step(state, a, exact.at(t))
            if self._hear is not None:
                self._hear(t, exact.at(t), after)
            is_due = (t + 1) % spec.precision.every == 0  # else the state stays, and its inputs are kept in 16 bits
            state = self._kept(spec, after, t + 1) if is_due else step(state, a, narrow.at(t))[1]
            outputs.append(y.flatten(1)[:, None])
        return torch.cat(outputs, 1), state

    def _kept(self, spec: StateSpec, value: Tensor, read: int) -> Tensor:
        """The recurrent state as the next call sees it."""
        # a compiled function may leave out the casts of a plain type
        run = rounded if spec.precision.is_plain else rounded_at_once
        seed = spec.precision.seed
        scales = self._scales(spec)
        # a seed is a shift of the position: one compiled function serves all layers
        position = torch.tensor((read + seed * pow(BY_POSITION, -1, PERIOD)) % PERIOD).view([1] * value.ndim)
        residual = None if spec.residual is None else spec.residual.precision
        return run(
            value, replace(spec.precision, seed=0), residual, position, None if scales is None else scales.clone()
        )

    def _seen(self, spec: StateSpec, value: Tensor, positions: Tensor) -> Tensor:
        """As a later call sees it, rounded when it was stored: entries of as many tokens as `value` has."""
        scales = self._scales(spec)
        return remembered.decode(
            spec.encoded(value, positions, scales), spec.precision, value.shape[spec.precision.axis], scales
        )

    def causal_conv(self, x, state, weight, bias):
        y, kept = super().causal_conv(x, state, weight, bias)
        spec = self._specs["conv_state"]
        if spec.precision.format == "fp32":
            return y, kept
        # rounded anew at every token, an input stays what it is
        assert spec.precision.rounding == "nearest" and spec.precision.block is None
        newest = self.weights(weight)[:, 0, -1]
        seen = self._seen(spec, x.transpose(1, 2), torch.tensor([[1]])).transpose(1, 2)
        rounded = super().causal_conv(seen, state, weight, bias)[0] + (x - seen) * newest
        return torch.cat([y[:, : self._prefill], rounded[:, self._prefill :]], 1), kept

    def attention(self, query, key, value, past_key, past_value, rotary):
        specs = [self._specs[name] for name in ("key", "value")]
        if all(spec.precision.format == "fp32" for spec in specs):
            return super().attention(query, key, value, past_key, past_value, rotary)
        query, key, value = (x.unflatten(2, (-1, past_key.shape[3])).transpose(1, 2) for x in (query, key, value))
        if rotary is not None:
            positions = self._positions(query.shape[0], 0, query.shape[2], query.device)
            query, key = rotated(query, positions, rotary), rotated(key, positions, rotary)
        read = torch.arange(1, key.shape[2] + 1)[None]
        seen = [self._seen(spec, made, read) for spec, made in zip(specs, (key, value), strict=True)]
        mixed = self._attended(query, key, value, *seen)
        return mixed.transpose(1, 2).flatten(2), key, value

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, seen_key: Tensor, seen_value: Tensor) -> Tensor:
        """query [B, Q, S, P]; key and value [B, G, S, P] as computed and as stored. -> [B, Q, S, P]"""
        first = min(self._prefill, query.shape[2])
        prompt = (x[:, :, :first] for x in (query, key, value))
        found = [F.scaled_dot_product_attention(*prompt, is_causal=True, enable_gqa=True)]
        repeats = query.shape[1] // key.shape[1]
        key, value, seen_key, seen_value = (x.repeat_interleave(repeats, 1) for x in (key, value, seen_key, seen_value))
        query = query * query.shape[3] ** -0.5
        for start in range(first, query.shape[2], QUERIES):
            rows = slice(start, start + QUERIES)
            asked, stop = query[:, :, rows], min(start + QUERIES, query.shape[2])
            scores = asked @ seen_key[:, :, :stop].mT  # [B, Q, rows, T]
            own = (asked * key[:, :, rows]).sum(-1)
            earlier = torch.ones(stop - start, stop, dtype=torch.bool).tril(start - 1)
            shares = torch.softmax(torch.cat([scores.masked_fill_(~earlier, -torch.inf), own[..., None]], -1), -1)
            found.append(shares[..., :-1] @ seen_value[:, :, :stop] + shares[..., -1:] * value[:, :, rows])
        return torch.cat(found, 2)


def decoded(model: HybridModel, index: int, hidden: Tensor, prefill: int = 1, hear: Hear | None = None) -> Tensor:
    """One layer on hidden [B, S, H] as decode would give it."""
    layer = model.layer(index)
    ops = Decoding(layer_weights(model, index, "cpu"), layer, prefill, hear)
    return layer.run(ops, hidden, empty_state(layer, hidden.shape[0], "cpu"))[0]
