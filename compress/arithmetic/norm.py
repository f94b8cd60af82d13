"""Norms."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, groups: int = 1) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, arXiv 1910.07467), or over each of
    `groups` equal parts of it."""
    if groups > 1:
        parts = x.unflatten(-1, (groups, -1))
        return weight * (parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2)
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
