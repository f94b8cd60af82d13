"""How tokens find their experts, described as data, and the arithmetic of it."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Router:
    """Names of its tensors within the layer, and what it does with its logits.

    A softmax is taken over all rows. Its gates over the chosen experts alone (a softmax after the top-k) are `renormalized`.
    Rows after the experts' belong to experts that were removed: they only stay in a softmax's denominator.
    """

    weight: str  # [R, H]
    rows: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    bias: str | None = None  # [E], added to the scores where experts are chosen, not where they are weighted
    groups: int = 1  # experts are chosen from `groups_used` of so many equal groups
    groups_used: int = 1
    renormalized: bool = False  # gates of a token sum to one
    scale: float = 1.0  # of all gates

    @property
    def inflates(self) -> bool:
        """Whether the gates of the others grow when experts are removed, because they no longer count in the denominator."""
        return self.score == "softmax" and not self.renormalized

    def gates(self, logits: torch.Tensor, experts: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        """logits [..., R] and bias [E] -> [..., E], zero for experts a token does not go to."""
        scores = torch.softmax(logits, dim=-1) if self.score == "softmax" else torch.sigmoid(logits)
        scores = scores[..., :experts]
        # logits decide, not their scores, in which other ones become equal; where something is added, it is to the scores
        chosen = choose(logits[..., :experts] if bias is None else scores + bias, self)
        weights = scores.gather(-1, chosen)
        if self.renormalized:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.scale != 1:
            weights = weights * self.scale
        return torch.zeros_like(scores).scatter_(-1, chosen, weights)


def choose(values: torch.Tensor, router: Router) -> torch.Tensor:
    """values [..., E] -> the numbers of the top-k largest, [..., top_k], of equal ones the lower number first.

    So ONNX defines its TopK. torch.topk leaves the order of equals open.
    """
    if router.groups > 1:
        values = _in_best_groups(values, router)
    return values.sort(dim=-1, descending=True, stable=True).indices[..., : router.top_k]


def _in_best_groups(values: torch.Tensor, router: Router) -> torch.Tensor:
    """values [..., E], -inf outside the groups whose two best experts sum highest (DeepSeek-V3, arXiv 2412.19437)."""
    grouped = values.unflatten(-1, (router.groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1)
    used = best.sort(dim=-1, descending=True, stable=True).indices[..., : router.groups_used]
    dropped = torch.ones_like(best, dtype=torch.bool).scatter_(-1, used, False)
    return grouped.masked_fill(dropped[..., None], -torch.inf).flatten(-2)


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., H], weight [R, H] -> [..., R], equal where rows are.

    Summed in float64: a float32 product sums some columns in another order than others, so that equal rows differ in the
    last bit and a tie is decided by noise. The router is so small that this takes no time.
    """
    return F.linear(x.double(), weight.double()).to(x.dtype)
