"""Scales that minimise the rounding error, rather than reach the largest magnitude.

    scale = argmin_s  sum_k m_k (w_k - s q_k)^2,      q_k = round(w_k / s) on the format's grid

per block that shares the scale, over a grid of scales around the absmax scale; where none is better, the absmax scale itself.
m is 1 (plain MSE), or the mean square of the k-th input over calibration tokens: then the sum is, but for correlations
between inputs, the error of the layer's output (the diagonal of GPTQ's Hessian, arXiv 2210.17323).
"""

import torch

from compress import parallel
from compress.formats.base import NumberFormat, blocked

FACTORS = torch.arange(16, 36) / 32  # candidates, as factors of the absmax scale; 30 / 32 puts it at -8 of int4
ROW_BLOCK_ELEMENTS = 1 << 20  # float32 elements worked on at a time: what stays in the cache


def search(weight: torch.Tensor, number_format: NumberFormat, moments: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [n, K] (whole blocks), moments [K] or None -> scales, 0 for a block of zeros."""
    step = number_format.rows or weight.shape[0]
    rows = max(1, ROW_BLOCK_ELEMENTS // (step * weight.shape[1])) * step
    return torch.cat(
        parallel.each(lambda block: _search_rows(block, number_format, moments), torch.split(weight, rows))
    )


def _search_rows(weight: torch.Tensor, number_format: NumberFormat, moments: torch.Tensor | None) -> torch.Tensor:
    absmax = number_format.absmax_scales(weight)
    unit = torch.where(absmax > 0, absmax, 1.0)
    # in units of the absmax scale: squares of small weights would underflow, and every candidate look as good
    scaled = weight / number_format.expand(unit, weight.shape)
    best = torch.ones_like(absmax)
    least = _loss(scaled, best, number_format, moments)
    for factor in FACTORS.tolist():
        candidate = torch.full_like(absmax, factor)
        loss = _loss(scaled, candidate, number_format, moments)
        better = loss < least
        best, least = torch.where(better, candidate, best), torch.where(better, loss, least)
    return best * absmax


def _loss(
    weight: torch.Tensor, scales: torch.Tensor, number_format: NumberFormat, moments: torch.Tensor | None
) -> torch.Tensor:
    """Summed (weighted) squared rounding error of every block."""
    expanded = number_format.expand(scales, weight.shape)
    error = (number_format.to_grid(weight / expanded).float() * expanded - weight).square()
    return _block_sums(error if moments is None else error * moments, number_format)


def _block_sums(error: torch.Tensor, number_format: NumberFormat) -> torch.Tensor:
    rows, columns = number_format.rows or error.shape[0], number_format.columns or error.shape[1]
    return blocked(error, rows, columns).sum(dim=(1, 3))
