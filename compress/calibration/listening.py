"""Operators that listen for the largest magnitude of what they give.

Heard is what a graph computes in the type of hidden states: products, sums, activations, norms, convolutions tap by tap, both
parts of what a scan gives, queries, keys and scores of attention (masked ones too: they are computed), and of an expert what it
gives to the tokens that are routed to it. Norms and scans within, routers and recurrent states are float32 in every graph, and a
softmax gives 1 at most.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from compress import parallel
from compress.errors import InputError
from compress.formats import hadamard
from compress.model.routing import Router
from compress.model.weight import Unit, is_finite
from compress.output_folder.overflow_facts import called
from compress.runtime.eager import Eager
from compress.runtime.inference import LayerWeights

Tensor = torch.Tensor
SCORES = 1 << 24  # computed together


@dataclass(frozen=True)
class Peak:
    """The largest magnitude that was heard, and where."""

    value: float = 0.0
    where: str = ""


class Ear:
    """Hears values of one unit, and keeps the `peak`."""

    def __init__(self, unit: str):
        self.unit, self.peak = unit, Peak()

    def hear(self, x: Tensor, where: str) -> Tensor:
        """x itself. Raises InputError for NaN and infinity."""
        if x.numel():
            least, most = (float(end) for end in torch.aminmax(x))
            if not is_finite(torch.tensor([least, most])):
                raise InputError(f"{called(self.unit)}: {where} holds NaN or infinity on the calibration tokens")
            if max(most, -least) > self.peak.value:
                self.peak = Peak(max(most, -least), where)
        return x


class Listening(Eager):
    """The arithmetic of a unit, whose weights are named with a prefix; `total` as in `Eager`."""

    def __init__(self, unit: Unit, prefix: str, weights: LayerWeights, ear: Ear, total: int):
        super().__init__(weights, total=total)
        self._unit, self._prefix, self._ear = unit, prefix, ear
        self._latest = ""

    def _after(self, what: str, x: Tensor) -> Tensor:
        """Said to be behind the matrix that was multiplied last, which tells where in the unit it is."""
        return self._ear.hear(x, f"{what} after '{self._latest}'" if self._latest else what)

    def linear(self, name: str, x: Tensor, bias: str | None = None) -> Tensor:
        """The product is a value before the bias is added."""
        self._latest = self._prefix + name
        if rotation := self._unit.weights[self._latest].rotation:
            self._ear.hear(hadamard.rotate(x, rotation), f"the rotated input of '{self._latest}'")
        where = f"the output of '{self._latest}'"
        product = self._ear.hear(super().linear(name, x), where)
        return product if bias is None else self._ear.hear(product + self.weights(bias), where)

    def rms_norm(self, x: Tensor, name: str, eps: float, groups: int = 1) -> Tensor:
        return self._ear.hear(super().rms_norm(x, name, eps, groups), f"the norm '{self._prefix}{name}'")

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._after("the sum", super().add(a, b))

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return self._after("the product", super().multiply(a, b))

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return self._after("a multiple", super().scale(x, factor))

    def silu(self, x: Tensor) -> Tensor:
        return self._after("the SiLU", super().silu(x))

    def squared_relu(self, x: Tensor) -> Tensor:
        return self._after("the squared ReLU", super().squared_relu(x))

    def softplus(self, x: Tensor) -> Tensor:
        return self._after("the softplus", super().softplus(x))

    def add_weight(self, x: Tensor, name: str) -> Tensor:
        return self._ear.hear(super().add_weight(x, name), f"the sum with '{self._prefix}{name}'")

    def causal_conv(self, x: Tensor, state: Tensor, weight: str, bias: str | None) -> tuple[Tensor, Tensor]:
        self._latest, kernel = self._prefix + weight, self.weights(weight)
        padded = torch.cat([state, x.transpose(1, 2)], 2)  # [B, D, W - 1 + S]
        total = torch.zeros(kernel.shape[0], 1, device=x.device) if bias is None else self.weights(bias)[:, None]
        for tap in range(kernel.shape[2]):
            term = padded[:, :, tap : tap + x.shape[1]] * kernel[:, :, tap]
            total = self._after("the convolution", total + self._after("the convolution", term))
        return super().causal_conv(x, state, weight, bias)

    def selective_scan(
        self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, a_log: str, d: str,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, state = super().selective_scan(x, dt, b, c, state, a_log, d, earlier)
        skipped = self._after("the skip around the scan", x * self.weights(d))
        self._after("the scan", y - skipped)
        return self._after("the scan", y), state

    def ssd(
        self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, a_log: str, d: str,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, state = super().ssd(x, dt, b, c, state, a_log, d, earlier)
        return self._after("the scan", y), state

    def _mixed(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        groups, tokens, width = key.shape[1:]
        self._after("the queries", query)
        self._after("the keys", key)
        scaled = self._after("the queries", query * width**-0.5).unflatten(1, (groups, -1))  # [B, G, Q / G, S, P]
        for rows, keys in zip(scaled.flatten(0, 1), key.flatten(0, 1), strict=True):
            for part in rows.flatten(0, 1).split(max(1, SCORES // tokens)):
                self._after("the attention scores", parallel.linear(part, keys))
        return super()._mixed(query, key, value)

    def mixture(
        self, x: Tensor, rows: Tensor, router: Router, experts: int, run: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        gates = self.gates(x, router, experts).flatten(0, -2)

        def gated(expert: int, routed: Tensor) -> Tensor:
            given, gate = run(expert, routed), gates[:, expert]
            self._after("the gated output", given * gate[gate != 0, None])
            return given

        return self._after("the experts' sum", super().mixture(x, rows, router, experts, gated))
