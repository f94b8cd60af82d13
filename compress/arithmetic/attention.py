"""Attention with grouped key-value heads, and rotary positions."""

import torch
import torch.nn.functional as F


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Causal attention with grouped key-value heads and no positional encoding (Jamba, arXiv 2403.19887).

    query [B, Q, S, P]; key, value [B, G, T, P] with the S newest tokens last; mask [B, T] or None. -> [B, Q, S, P].
    """
    length, total = query.shape[2], key.shape[2]
    if mask is None and length in (1, total):
        return F.scaled_dot_product_attention(query, key, value, is_causal=length > 1, enable_gqa=True)
    row = torch.arange(total - length, total, device=query.device)[:, None]
    column = torch.arange(total, device=query.device)
    allowed = (column <= row)[None]
    if mask is not None:
        # a padded query attends to itself: its output is never used, but must not be NaN
        allowed = allowed & (mask.bool()[:, None] | (column == row)[None])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed[:, None], enable_gqa=True)


def rotated(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """x [B, heads, S, P] turned by its positions [B, S]: pairs (i, i + P/2) by positions * base^(-2i/P) (Su et al., RoFormer,
    arXiv 2104.09864, in the order of halves that Llama has)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = (positions[:, None, :, None] * frequencies).to(torch.float32)  # [B, 1, S, P/2]
    first, second = x[..., :half], x[..., half:]
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
