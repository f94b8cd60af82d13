"""How tokens find their experts, described as data, and the arithmetic of it."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

GROUP_SCORES = 2  # a group of experts is judged by the sum of so many of its best
SMALLEST_SUM = 1e-20  # keeps gates finite where every score is 0


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
    groups: int = 1  # experts are chosen from `groups_used` of so many equal groups (DeepSeek-V3, arXiv 2412.19437)
    groups_used: int = 1
    renormalized: bool = False  # gates of a token sum to one
    scale: float = 1.0  # of all gates

    @property
    def inflates(self) -> bool:
        """Whether the gates of the others grow when experts are removed, because they no longer count in the denominator."""
        return self.score == "softmax" and not self.renormalized

    def gates(self, logits: torch.Tensor, experts: int, bias: torch.Tensor | None = None) -> torch.Tensor:
        """logits [..., R] and bias [E] -> [..., E], zero for experts a token does not go to."""
        weights, chosen = self.choice(logits, experts, bias)
        return torch.zeros_like(logits[..., :experts]).scatter_(-1, chosen, weights)

    def choice(
        self, logits: torch.Tensor, experts: int, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same as weights and numbers of the experts that a token goes to, [..., top_k] each."""
        scores = (torch.softmax(logits, dim=-1) if self.score == "softmax" else torch.sigmoid(logits))[..., :experts]
        chosen = choose(self._ranks(logits[..., :experts], scores, bias), self.top_k)
        weights = scores.gather(-1, chosen)
        if self.renormalized:
            weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_SUM)
        return (weights if self.scale == 1 else weights * self.scale), chosen

    @property
    def chooses_by_logits(self) -> bool:
        """Logits tell apart what their softmax no longer does; where something is added or summed, it is scores."""
        return self.score == "softmax" and self.bias is None and self.groups == 1

    def _ranks(self, logits: torch.Tensor, scores: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What experts are chosen by, [..., E]: minus infinity outside the groups whose best experts sum highest."""
        if self.chooses_by_logits:
            return logits
        ranks = scores if bias is None else scores + bias
        if self.groups_used == self.groups:
            return ranks
        parts: torch.Tensor = ranks.unflatten(-1, (self.groups, -1))
        best = choose(parts.topk(GROUP_SCORES, dim=-1).values.sum(-1), self.groups_used)
        dropped = torch.ones(parts.shape[:-1], dtype=torch.bool, device=ranks.device).scatter_(-1, best, False)
        return parts.masked_fill(dropped[..., None], -torch.inf).flatten(-2)


def choose(ranks: torch.Tensor, top_k: int) -> torch.Tensor:
    """ranks [..., E] -> the numbers of the top_k largest, [..., top_k], of equal ones the lower number first.

    So ONNX defines its TopK. torch.topk leaves the order of equals open.
    """
    return ranks.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]


def logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., H], weight [R, H] -> [..., R], equal where rows are.

    Summed in float64: a float32 product sums some columns in another order than others, so that equal rows differ in the
    last bit and a tie is decided by noise. The router is so small that this takes no time.
    """
    return F.linear(x.double(), weight.double()).to(x.dtype)
