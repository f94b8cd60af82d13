"""What is kept of the inputs of a matrix: second moments, largest magnitudes, a sample of magnitudes."""

import torch

from compress import parallel
from compress.errors import InputError, WorkError
from compress.formats import hadamard
from compress.model.weight import is_finite

SAMPLE_ROWS = 4096  # rows of the inputs whose magnitudes are kept for the choice of a static range


class Moments:
    """Statistics of the rows x [K] that reach a group of matrices, added up block by block on `device`.

    hessian [K, K]: mean of x x';  square [K]: its diagonal;  absmax [K];  tokens: rows seen.
    """

    def __init__(self, width: int, device: str, *, with_hessian: bool, with_sample: bool, rotation: int | None = None):
        self.tokens, self._with_sample, self._rotation = 0, with_sample, rotation
        self._square, self.absmax = torch.zeros(width, device=device), torch.zeros(width, device=device)
        self._hessian = torch.zeros(width, width, device=device) if with_hessian else None
        self._rows: list[torch.Tensor] = []
        self._step = 1

    def add(self, x: torch.Tensor, name: str) -> None:
        """x [..., K]; `name` is the matrix, for the refusal of inputs that are not finite."""
        rows = x.reshape(-1, x.shape[-1])
        rows = hadamard.rotate(rows, self._rotation) if self._rotation else rows
        most = rows.abs().amax(0) if len(rows) else torch.zeros_like(self.absmax)
        if not is_finite(most):
            raise InputError(
                f"tensor '{name}': its inputs on the calibration tokens hold NaN or infinity; the model overflows there"
            )
        self._name = name
        self.tokens += len(rows)
        self.absmax = torch.maximum(self.absmax, most)
        if self._hessian is None:
            self._square += rows.square().sum(0)
        else:
            parallel.add_moments(self._hessian, rows)
        if self._with_sample:
            self._keep_sample(rows)

    def _keep_sample(self, rows: torch.Tensor) -> None:
        """Every n-th row of all that were seen; when the store is full, every second one goes, and n doubles."""
        first = -(self.tokens - len(rows)) % self._step  # the first of these rows whose running number n divides
        self._rows.append(rows[first :: self._step].abs())
        while sum(map(len, self._rows)) > SAMPLE_ROWS:
            self._rows, self._step = [torch.cat(self._rows)[::2].clone()], 2 * self._step

    def count_own_error(self, share: float) -> None:
        """Adds inputs that are the same in every direction, of so large a share of the mean: they weigh the error of the
        matrix itself, beside that of its products."""
        if self._hessian is not None:
            self._hessian.diagonal().add_(share * self._hessian.diagonal().mean())

    @property
    def hessian(self) -> torch.Tensor:
        if self._hessian is None:
            raise WorkError("second moments were not asked for")
        return self._mean(parallel.mirror(self._hessian))

    @property
    def square(self) -> torch.Tensor:
        return self._mean(self._square if self._hessian is None else self._hessian.diagonal())

    def _mean(self, total: torch.Tensor) -> torch.Tensor:
        if not bool(torch.isfinite(total).all()):
            raise InputError(
                f"tensor '{self._name}': its inputs on the calibration tokens are so large that their squares overflow"
            )
        return total / max(1, self.tokens)

    @property
    def sample(self) -> torch.Tensor:
        """Magnitudes of single inputs, [n]."""
        return torch.cat(self._rows).flatten() if self._rows else torch.zeros(1)
