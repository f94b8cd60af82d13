"""Norms."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, groups: int = 1) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich, arXiv 1910.07467), or over each of
    `groups` equal parts of it."""
    parts: torch.Tensor = x.unflatten(-1, (groups, -1)) if groups > 1 else x
    normed = parts * torch.rsqrt(parts.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (normed.flatten(-2) if groups > 1 else normed)
