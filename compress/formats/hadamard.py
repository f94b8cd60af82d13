"""Hadamard rotation of the input of a matrix, so that outliers are spread over many channels before it is rounded.

    W x = (W R)(R x)        R = H / sqrt(n) in blocks of n on the diagonal,  H Sylvester's Hadamard matrix:  R = R' = 1/R

Quamba (arXiv 2410.13229) rotates the output of the selective scan so and folds R into out_proj. The gate stands between
the scan and out_proj, so R x cannot be folded into what comes before: it is computed, n additions for each channel.
"""

import math

import torch

from compress import parallel


def block_size(width: int) -> int:
    """The largest power of two that divides the width of the input."""
    return width & -width


def matrix(size: int) -> torch.Tensor:
    """R for one block, float32 [n, n]: symmetric, and its own inverse."""
    h = torch.ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / math.sqrt(size)


def rotate(x: torch.Tensor, size: int) -> torch.Tensor:
    """x [..., K] -> R x, block by block. For a matrix [N, K] it gives W R. Twice is the identity."""
    return parallel.linear(x.unflatten(-1, (-1, size)), matrix(size).to(x.device)).flatten(-2)
