"""What a router makes of its logits: which experts a token goes to, and how much each counts.

E  experts    R  rows of the router, E or more: those of removed experts come last
"""

from typing import Literal

import torch

from compress.model import layers

Score = Literal["softmax", "sigmoid"]
GROUP_SCORES = 2  # a group of experts is judged by the sum of so many of its best
SMALLEST_SUM = 1e-20  # keeps gates finite where every score is 0


def gates(logits: torch.Tensor, top_k: int, experts: int, score: Score = "softmax", bias: torch.Tensor | None = None,
          groups: int = 1, groups_used: int = 1, renormalized: bool = False, scale: float = 1.0) -> torch.Tensor:  # fmt: skip
    """logits [..., R] -> [..., E], zero for experts a token does not go to.

    Experts are chosen by their score plus `bias` [E] and weighted by the score alone; of equal ones the lower number goes
    first. Of `groups` equal runs of experts only the best `groups_used` are chosen from. `renormalized` makes the gates of
    a token sum to 1, before `scale`.
    """
    if score == "softmax" and bias is None and groups == 1:  # logits tell apart what their softmax no longer does
        scores, ranks = torch.softmax(logits, dim=-1)[..., :experts], logits[..., :experts]
    else:
        scores = (torch.softmax(logits, dim=-1) if score == "softmax" else torch.sigmoid(logits))[..., :experts]
        ranks = _in_best_groups(scores if bias is None else scores + bias, groups, groups_used)
    chosen = layers.choose_experts(ranks, top_k)
    weights = scores.gather(-1, chosen)
    if renormalized:
        weights = weights / (weights.sum(-1, keepdim=True) + SMALLEST_SUM)
    return torch.zeros_like(scores).scatter_(-1, chosen, weights if scale == 1.0 else weights * scale)


def _in_best_groups(ranks: torch.Tensor, groups: int, used: int) -> torch.Tensor:
    """ranks [..., E], minus infinity in groups that are not among the best."""
    if used == groups:
        return ranks
    parts = ranks.unflatten(-1, (groups, -1))
    best = layers.choose_experts(parts.topk(GROUP_SCORES, dim=-1).values.sum(-1), used)
    dropped = torch.ones(parts.shape[:-1], dtype=torch.bool, device=ranks.device).scatter_(-1, best, False)
    return parts.masked_fill(dropped[..., None], -torch.inf).flatten(-2)
