"""GPTQ (Frantar et al., arXiv 2210.17323): rounds a matrix column by column, and lets the columns still to come make up
for the error of those already rounded, as the second moments of the layer's inputs say they can.

    minimise  || X W' - X W'q ||^2        H = X'X        error of column j = (w_j - q_j) / U_jj,  U = chol(H^-1) upper
    w_k -= error_j U_jk   for every later column k

Scales are fixed beforehand (static groups), so columns may be taken in any order: with `act_order`, by falling H_jj.
"""

import torch

from compress.formats.base import NumberFormat, Quantized

BLOCK = 128  # columns whose updates are applied to the rest together
DOUBLE_COLUMNS = 2048  # more columns are factored in float32, which takes half the time and memory
MOST_DAMPING = 1.0  # damping is raised tenfold until the Hessian can be factored, up to the mean of its diagonal


def quantize(weight: torch.Tensor, hessian: torch.Tensor, number_format: NumberFormat, scales: torch.Tensor, *,
             damping: float = 0.01, act_order: bool = True) -> Quantized:  # fmt: skip
    """float32 [N, K], hessian [K, K] (any multiple of X'X), scales of the format -> values chosen for the output's error.

    An input that was always zero has no say: its weights are rounded to nearest and take part in nothing.
    """
    columns = weight.shape[1]
    hessian = hessian.double() if columns <= DOUBLE_COLUMNS else hessian
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    order = order.to(weight.device)
    upper = _inverse_factor(hessian[order][:, order], damping).float()
    expanded = number_format.expand(scales, weight.shape).expand(weight.shape)[:, order]
    remaining, values = weight[:, order].clone(), None
    for start in range(0, columns, BLOCK):
        block = slice(start, min(start + BLOCK, columns))
        rounded, errors = _round_block(remaining[:, block], upper[block, block], expanded[:, block], number_format)
        values = torch.empty(weight.shape, dtype=rounded.dtype, device=weight.device) if values is None else values
        values[:, block] = rounded
        remaining[:, block.stop :] -= errors @ upper[block, block.stop :]
    return Quantized(values[:, torch.argsort(order)], scales, number_format.name)


def _round_block(weight: torch.Tensor, upper: torch.Tensor, scales: torch.Tensor, number_format: NumberFormat):
    """Values and scaled errors of a block of columns, [N, block] each."""
    weight, errors = weight.T.contiguous(), torch.empty_like(weight.T)
    scales, values = scales.T.contiguous(), []
    for j in range(weight.shape[0]):
        values.append(number_format.to_grid(weight[j] / scales[j]))
        errors[j] = (weight[j] - values[j].float() * scales[j]) / upper[j, j]
        weight[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    return torch.stack(values, 1), errors.T


def _inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(hessian.dtype).tiny)
    dead = torch.where(diagonal > 0, 0.0, mean)
    while True:
        damped = hessian + torch.diag(dead + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed or damping >= MOST_DAMPING:
            break
        damping *= 10
    inverse = torch.cholesky_inverse(lower)
    return torch.linalg.cholesky(inverse, upper=True)
