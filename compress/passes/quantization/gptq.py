"""GPTQ (Frantar et al., arXiv 2210.17323): rounds a matrix column by column, and lets the columns still to come make up
for the error of those already rounded, as the second moments of the layer's inputs say they can.

    minimise  || X W' - X W'q ||^2        H = X'X        error of column j = (w_j - q_j) / U_jj,  U = chol(H^-1) upper
    w_k -= error_j U_jk   for every later column k

Scales are fixed beforehand (static groups), so columns may be taken in any order: with `act_order`, by falling H_jj.
"""

from typing import NamedTuple

import torch

from compress import parallel
from compress.errors import WorkError
from compress.formats.base import NumberFormat, Quantized
from compress.passes.quantization import cholesky

BLOCK = 128  # columns whose updates are applied to the rest together
DOUBLE_COLUMNS = 2048  # more columns are factored in float32, which takes half the time and memory
ROWS = 512  # of the matrix worked on at a time
MOST_DAMPING = 1.0  # damping is raised tenfold until the Hessian can be factored, up to the mean of its diagonal


class Factor(NamedTuple):
    """What GPTQ needs of the inputs, the same for every matrix they reach: U [K, K], its columns in this order [K]."""

    upper: torch.Tensor
    order: torch.Tensor


def factor(hessian: torch.Tensor, *, damping: float = 0.01, act_order: bool = True) -> Factor:
    """Of the second moments [K, K] (any multiple of X'X)."""
    columns = len(hessian)
    hessian = hessian.double() if columns <= DOUBLE_COLUMNS else hessian
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    order = order.to(hessian.device)
    return Factor(_inverse_factor(hessian[order][:, order], damping).float(), order)


def quantize(weight: torch.Tensor, inputs: Factor, number_format: NumberFormat, scales: torch.Tensor) -> Quantized:
    """float32 [N, K], the factor of its inputs, scales of the format -> values chosen for the output's error.

    An input that was always zero has no say: its weights are rounded to nearest and take part in nothing. Rows do not
    depend on each other, so they go in blocks.
    """
    step = number_format.rows or len(weight)
    rows = max(1, ROWS // step) * step

    def quantized(start: int) -> torch.Tensor:
        block = slice(start, min(start + rows, len(weight)))
        return _quantize_rows(weight[block], inputs, number_format, number_format.scales_of(scales, block))

    values = parallel.each(quantized, range(0, len(weight), rows))
    return Quantized(torch.cat(values), scales, number_format.name)


def _quantize_rows(
    weight: torch.Tensor, inputs: Factor, number_format: NumberFormat, scales: torch.Tensor
) -> torch.Tensor:
    """The values of some rows, columns in the matrix's own order."""
    upper, order = inputs
    expanded = number_format.expand(scales, weight.shape).expand(weight.shape)[:, order]
    remaining, rounded = weight[:, order], []
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[1]))
        values, errors = _round_block(remaining[:, block], upper[block, block], expanded[:, block], number_format)
        rounded.append(values)
        remaining[:, block.stop :] -= errors @ upper[block, block.stop :]
    return torch.cat(rounded, 1)[:, torch.argsort(order)]


def _round_block(
    weight: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor, number_format: NumberFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scaled errors of a block of columns, [N, block] each."""
    weight, errors = weight.T.contiguous(), torch.empty_like(weight.T)
    scales, values = scales.T.contiguous(), []
    for j in range(weight.shape[0]):
        values.append(number_format.to_grid(weight[j] / scales[j]))
        errors[j] = (weight[j] - values[j].float() * scales[j]) / upper[j, j]
        weight[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    return torch.stack(values, 1), errors.T


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian, which is overwritten."""
    diagonal = hessian.diagonal().clone()
    mean = diagonal.mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    dead = torch.where(diagonal > 0, 0.0, mean)
    while True:
        hessian.diagonal().copy_(diagonal + dead + damping * mean)
        upper = cholesky.inverse_factor(hessian)
        if upper is not None:
            return upper
        if damping >= MOST_DAMPING:
            raise WorkError("the second moments of a matrix's inputs cannot be factored, however much they are damped")
        damping = min(10 * damping, MOST_DAMPING)
