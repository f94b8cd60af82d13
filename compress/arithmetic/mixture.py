"""Sparse mixtures of experts."""

from collections.abc import Callable

import torch


def mixture(x: torch.Tensor, gates: torch.Tensor, expert: Callable[[int, torch.Tensor], torch.Tensor],
        only: set[int] | None = None) -> torch.Tensor:  # fmt: skip
    """Sparse mixture of experts: x [..., H], gates [..., E] -> [..., H].

    `expert(e, rows)` runs expert e on the rows [n, H] routed to it, and is called only for experts that have any (of
    `only`, where given), so weights are touched one expert at a time.
    """
    rows, gates = x.reshape(-1, x.shape[-1]), gates.reshape(-1, gates.shape[-1])
    result = torch.zeros_like(rows)
    used = gates.any(0).nonzero()[:, 0].tolist()
    for e in used if only is None else sorted(only.intersection(used)):
        routed = gates[:, e].nonzero()[:, 0]
        result.index_add_(0, routed, expert(e, rows[routed]) * gates[routed, e, None])
    return result.view_as(x)
