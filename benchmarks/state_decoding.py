"""What a layer gives when its tokens are decoded one by one and its states rounded, at the cost of a prefill and a loop over the
states alone.

Only a recurrent state needs the loop. A KV entry and an input of a convolution are rounded once, when they are stored, whatever
comes later: attention and convolution see them through that rounding, and the newest token's own as computed. So each operator
over time takes all tokens at once here and gives what calls of one token would (`stream(..., decode=True)`; the study checks it).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.arithmetic.attention import rotated
from compress.model.block import Layer
from compress.model.hybrid import HybridModel
from compress.model.states import StateSpec
from compress.runtime.eager import Eager
from compress.runtime.inference import calls, empty_state, layer_weights

QUERIES = 128  # of attention at once: their scores are [B, Q, QUERIES, T]
Hear = Callable[[int, list[Tensor], Tensor], None]


class Decoding(Eager):
    """One layer's operators. The first `prefill` tokens are one call. `hear(t, inputs, state)` is told of the scan's
    inputs and of the state before it is rounded, after token t."""

    def __init__(self, weights, layer: Layer, prefill: int = 1, hear: Hear | None = None):
        super().__init__(weights)
        self._specs = {spec.name: spec for spec in layer.states}
        self._prefill, self._hear = prefill, hear

    def state_in(self, spec: StateSpec, stored: Tensor) -> Tensor:
        return torch.zeros(stored.shape[0], *spec.shape)

    def state_out(self, spec: StateSpec, value: Tensor, kept: Tensor) -> Tensor:
        return kept  # rounded already, where it is made

    def selective_scan(self, x, dt, b, c, state, a_log, d):
        run = super().selective_scan
        return self._by_call(lambda *now: run(*now, a_log, d), (x, dt, b, c), state)

    def ssd(self, x, dt, b, c, state, a_log, d):
        run = super().ssd
        return self._by_call(lambda *now: run(*now, a_log, d), (x, dt, b, c), state)

    def _by_call(self, run: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], state: Tensor):
        """A scan whose state is kept, and rounded, from call to call."""
        spec, outputs = self._specs["recurrent_state"], []
        if spec.precision.format == "fp32" and self._hear is None:
            return run(*inputs, state)
        for start, stop in calls(inputs[0].shape[1], self._prefill):
            now = [x[:, start:stop] for x in inputs]
            given, after = run(*now, state)
            if self._hear is not None:
                self._hear(stop - 1, now, after)
            state = (
                self._kept(spec, after, stop) if self._is_due(spec, start, stop) else run(*_in_16_bits(now), state)[1]
            )
            outputs.append(given)
        return torch.cat(outputs, 1), state

    @staticmethod
    def _is_due(spec: StateSpec, start: int, stop: int) -> bool:
        """Whether the state is rounded at the end of a call; else the inputs are kept."""
        return stop - start > 1 or stop % getattr(spec.precision, "every", 1) == 0

    def _kept(self, spec: StateSpec, value: Tensor, read: int) -> Tensor:
        """The recurrent state as the next call sees it."""
        positions = torch.tensor([[read]])
        seen = self._seen(spec, value, positions)
        return (
            seen
            if getattr(spec, "residual", None) is None
            else seen + self._seen(spec.residual, value - seen, positions)
        )

    def _seen(self, spec: StateSpec, value: Tensor, positions: Tensor) -> Tensor:
        """As a later call sees it: rounded when it was stored."""
        scales = self._scales(spec)
        return spec.restored(spec.encoded(value, positions, scales), scales)

    def causal_conv(self, x, state, weight, bias):
        y, kept = super().causal_conv(x, state, weight, bias)
        spec = self._specs["conv_state"]
        if spec.precision.format == "fp32":
            return y, kept
        assert spec.precision.rounding == "nearest"  # rounded anew at every token, it stays what it is
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


def _in_16_bits(inputs: list[Tensor]) -> list[Tensor]:
    """A token's x, dt and b as a state keeps them that is not rounded yet; c is not kept."""
    *kept, c = inputs
    return [*(x.half().float() for x in kept), c]


def decoded(model: HybridModel, index: int, hidden: Tensor, prefill: int = 1, hear: Hear | None = None) -> Tensor:
    """One layer on hidden [B, S, H] as decode would give it."""
    layer = model.layer(index)
    ops = Decoding(layer_weights(model, index, "cpu"), layer, prefill, hear)
    return layer.run(ops, hidden, empty_state(layer, hidden.shape[0], "cpu"))[0]
