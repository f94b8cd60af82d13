"""The triangular factor of an inverse, in tiles that threads share: LAPACK's digits depend on how many it is given.

    H = R R',  R upper triangular       H^-1 = U' U,  U = R^-1

R is the Cholesky factor of H with rows and columns reversed, reversed back. The inverse itself is never formed, which
takes half the multiplications of factoring it, and loses fewer digits.
"""

import torch

from compress import parallel


def inverse_factor(matrix: torch.Tensor) -> torch.Tensor | None:
    """U [K, K] of a symmetric matrix [K, K]; None where it is not positive definite."""
    reversed_ = matrix.flip(0, 1)
    return _inverse(reversed_.flip(0, 1)) if _factor(reversed_) else None


def _factor(matrix: torch.Tensor) -> bool:
    """L of the matrix L L', in its own lower triangle; the upper one is left as it comes."""
    for panel in parallel.slices(len(matrix), parallel.TILE):
        corner, failed = torch.linalg.cholesky_ex(matrix[panel, panel])
        if failed:
            return False
        matrix[panel, panel] = corner
        _eliminate(matrix, panel, corner)
    return True


def _eliminate(matrix: torch.Tensor, panel: slice, corner: torch.Tensor) -> None:
    """The columns of a panel below its corner, and what they leave of the columns after it."""
    below = parallel.slices(len(matrix), parallel.TILE, panel.stop)

    def solve(rows: slice) -> None:
        matrix[rows, panel] = torch.linalg.solve_triangular(corner.T, matrix[rows, panel], upper=True, left=False)

    def subtract(tile: tuple[slice, slice]) -> None:
        rows, columns = tile
        matrix[tile].addmm_(matrix[rows, panel], matrix[columns, panel].T, alpha=-1)

    parallel.each(solve, below)
    parallel.each(subtract, [(rows, columns) for i, rows in enumerate(below) for columns in below[: i + 1]])


def _inverse(upper: torch.Tensor) -> torch.Tensor:
    """Of an upper triangular matrix; what lies below its diagonal is not looked at."""
    inverse = torch.zeros_like(upper)

    def solve(columns: slice) -> None:
        reach = slice(0, columns.stop)
        unit = torch.zeros(columns.stop, columns.stop - columns.start, dtype=upper.dtype, device=upper.device)
        unit[columns].fill_diagonal_(1)
        inverse[reach, columns] = torch.linalg.solve_triangular(upper[reach, reach], unit, upper=True)

    parallel.each(solve, parallel.slices(len(upper), parallel.TILE))
    return inverse
