"""What a layer's output loses without some of its experts, and the experts it can best spare.

With y the sum the experts give a token and y' what is left of it, the loss is the mean over the sampled, withheld tokens
of |y - y'|^2 / |h|^2. Both are combinations of the same outputs f_e(x), so the inner products f_e(x) . f_d(x) of every
token give the loss of any set of experts. Every set is tried where there are few (as in arXiv 2402.14800), else experts
are left out one by one, each time the one whose loss is least.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from compress.passes.pruning.statistics import Statistics

EXHAUSTIVE = 256  # sets of experts that are all tried
Kept = tuple[int, ...]  # numbers of the experts that stay, ascending


class Combination(NamedTuple):
    """Of the experts' outputs, for n tokens: the few experts that count for a token, and how much; [n, k] each."""

    weights: torch.Tensor
    experts: torch.Tensor


def gates_of(statistics: Statistics, logits: torch.Tensor, kept: Kept, *, keep_rows: bool) -> torch.Tensor:
    """logits [T, E] of all experts -> the gates [T, k] of those that stay; `keep_rows`: the others' logits stay in the
    denominator."""
    logits, bias = _left_of_router(statistics, logits, kept, keep_rows=keep_rows)
    return statistics.router.gates(logits, len(kept), bias)


def _left_of_router(
    statistics: Statistics, logits: torch.Tensor, kept: Kept, *, keep_rows: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a router without the other experts goes by."""
    order = router_order(kept, logits.shape[1], keep_rows=keep_rows)
    return logits[:, order], None if statistics.bias is None else statistics.bias[list(kept)]


def router_order(kept: Sequence[int], experts: int, *, keep_rows: bool) -> list[int]:
    """Which rows a router has, in order."""
    return [*kept, *((expert for expert in range(experts) if expert not in kept) if keep_rows else ())]


def factor(both: float, own: float) -> float:
    """What to multiply y' with to come closest to y, from <y, y'> and <y', y'>; 1 where nothing positive does."""
    return both / own if own > 0 and both > 0 else 1.0


class Reconstruction:
    """Losses of sets of experts of one layer, for one way of treating the router."""

    def __init__(self, statistics: Statistics, router: str):
        self._statistics, self._logits = statistics, statistics.logits[statistics.sample]
        self._router, self._experts = router, statistics.experts
        self._gram = statistics.gram.flatten(1)
        self._shares = statistics.importance[statistics.sample].double() / len(statistics.sample)
        self._full = self._combination(tuple(range(self._experts)))
        self._whole = self._inner(self._full, self._full)

    def loss(self, kept: Kept) -> float:
        """Of the layer with these experts only; with `rescale`, at the factor that is best for the sample."""
        left = self._combination(kept)
        both, own = self._inner(self._full, left), self._inner(left, left)
        scale = factor(both, own) if self._router == "rescale" else 1.0
        return max(0.0, self._whole - 2 * scale * both + scale**2 * own)

    def share(self, loss: float) -> float:
        """A loss as a share of what the experts give: 1 where nothing is left of it."""
        return loss / max(self._whole, 1e-30)

    def best(self, count: int) -> tuple[Kept, float]:
        """The `count` experts whose loss is least, and that loss."""
        return self.curve(count)[count]

    def curve(self, least: int) -> dict[int, tuple[Kept, float]]:
        """For every count from all but one down to `least`: the best experts and their loss."""
        found, kept = {}, tuple(range(self._experts))
        for count in range(self._experts - 1, least - 1, -1):
            if math.comb(self._experts, count) <= EXHAUSTIVE:
                candidates: Iterable[Kept] = combinations(range(self._experts), count)
            else:
                candidates = combinations(kept, count)
            loss, kept = min((self.loss(candidate), candidate) for candidate in candidates)
            found[count] = (kept, loss)
        return found

    def _combination(self, kept: Kept) -> Combination:
        """What a layer with these experts gives the sampled tokens."""
        keep_rows = self._router == "keep_rows"
        logits, bias = _left_of_router(self._statistics, self._logits, kept, keep_rows=keep_rows)
        weights, chosen = self._statistics.router.choice(logits, len(kept), bias)
        return Combination(weights, torch.tensor(kept, device=chosen.device)[chosen])

    def _inner(self, a: Combination, b: Combination) -> float:
        """Weighted mean over the sample of the inner product of two combinations of outputs. Of a token's E x E products only
        those of the experts it goes to are touched; in float64, since losses are small differences of such sums."""
        pairs = (a.experts[:, :, None] * self._experts + b.experts[:, None]).flatten(1)
        weights = (a.weights[:, :, None].double() * b.weights[:, None]).flatten(1)
        return float((self._gram.gather(1, pairs) * weights).sum(1) @ self._shares)
