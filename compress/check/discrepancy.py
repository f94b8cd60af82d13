"""How a tensor differs from what it ought to be: as a whole, by row, by column, and in scale.

With d = stored - ought, the relative error of a tensor, a row or a column is |d| / |ought| (Frobenius norms), and its gain the
factor g of the projection <stored, ought> / <ought, ought>: 1 where an error points nowhere, 2 where all was doubled.
"""

import math
from dataclasses import dataclass

import torch

from compress.model.weight import Weight

LEAST = 1e-30  # of a sum of squares that is divided by
LISTED = 4  # rows that a sentence names
FEW = 0.5  # of the rows: where more differ, the tensor does
EXPLAINED = 0.2  # of an error is left where one number explains it
COUNTS = 0.01  # of a mean column's energy: what is less may be rounded to nothing


@dataclass(frozen=True)
class Discrepancy:
    """Sums of a tensor seen as a matrix [N, K], its first dimension against all others, float64: of d^2, ought^2 and stored x ought
    by row [N], of d^2, ought^2 and stored^2 by column [K], and of d over all."""

    rows: torch.Tensor
    rows_ought: torch.Tensor
    rows_inner: torch.Tensor
    columns: torch.Tensor
    columns_ought: torch.Tensor
    columns_stored: torch.Tensor
    shift: float

    @property
    def error(self) -> float:
        return _root(float(self.rows.sum()), float(self.rows_ought.sum()))

    @property
    def by_row(self) -> torch.Tensor:
        """Relative errors [N]."""
        return (self.rows / self.rows_ought.clamp_min(LEAST)).sqrt()

    @property
    def by_column(self) -> torch.Tensor:
        """Relative errors [K]."""
        return (self.columns / self.columns_ought.clamp_min(LEAST)).sqrt()

    @property
    def gain(self) -> float:
        return float(self.rows_inner.sum()) / max(float(self.rows_ought.sum()), LEAST)

    @property
    def gain_by_row(self) -> torch.Tensor:
        """[N]; 1 for a row of zeros."""
        return torch.where(self.rows_ought > LEAST, self.rows_inner / self.rows_ought.clamp_min(LEAST), 1.0)

    @property
    def emptied(self) -> torch.Tensor:
        """Columns of zeros that ought to count, bool [K]."""
        return (self.columns_stored == 0) & (self.columns_ought > COUNTS * self.columns_ought.mean())

    @property
    def error_beside_gain(self) -> float:
        """What is left of the relative error when stored values are divided by the gain."""
        whole, gain = max(float(self.rows_ought.sum()), LEAST), self.gain
        return math.sqrt(max(0.0, float(self.columns_stored.sum()) / gain**2 / whole - 1)) if gain else math.inf

    @property
    def mean_shift(self) -> float:
        return self.shift / (len(self.rows) * len(self.columns))

    @property
    def error_beside_shift(self) -> float:
        """What is left of the relative error when the mean of d is taken off."""
        left = float(self.rows.sum()) - self.mean_shift * self.shift
        return _root(max(0.0, left), float(self.rows_ought.sum()))


def between(stored: Weight, ought: Weight) -> Discrepancy:
    """Of two tensors of one shape, read a block of rows at a time."""
    by_row: list[torch.Tensor] = []
    by_column, shift = torch.zeros(()), 0.0
    for block in stored.row_blocks():
        there, expected = (_as_matrix(weight.dense(block)).double() for weight in (stored, ought))
        lost = there - expected
        by_row.append(torch.stack([(a * b).sum(1) for a, b in ((lost, lost), (expected, expected), (there, expected))]))
        by_column = by_column + torch.stack([part.square().sum(0) for part in (lost, expected, there)])
        shift += float(lost.sum())
    rows, columns = torch.cat(by_row, 1), by_column
    return Discrepancy(rows[0], rows[1], rows[2], columns[0], columns[1], columns[2], shift)


def _as_matrix(dense: torch.Tensor) -> torch.Tensor:
    return dense[:, None] if dense.dim() == 1 else dense.flatten(1)


def described(found: Discrepancy, rows: torch.Tensor, columns: torch.Tensor, plain: float) -> str:
    """What happened to a tensor, as far as sums tell. `rows` [N] and `columns` [K] are by how much each differs from what it may, 1
    at most where it may; a relative error of `plain` is none to speak of."""
    if not bool(found.columns_stored.any()):
        return "is all zero"
    left, words = min(
        (found.error_beside_gain, f"is {found.gain:.3g} times what it ought to be"),
        (found.error_beside_shift, f"is {found.mean_shift:+.3g} off everywhere"),
    )
    if found.error > plain and left <= max(plain, found.error * EXPLAINED):
        return words
    if float(found.columns[found.emptied].sum()) > FEW * float(found.columns.sum()):
        return emptied(found)
    for word, excess in (("row", rows), ("column", columns)):
        if len(excess) > 1 and 0 < int((excess > 1).sum()) <= FEW * len(excess):
            return f"differs in {_listed(word, excess)}"
    return "differs"


def emptied(found: Discrepancy) -> str:
    return f"is zero in {_listed('column', found.emptied.double())}"


def _listed(word: str, excess: torch.Tensor) -> str:
    """Such as `rows 8, 3, 5, 12 and 12 more of 64`, the worst first; those of less than half the worst's excess are not meant: what
    shares a scale with a large value is rounded more coarsely."""
    order = excess.argsort(descending=True, stable=True)
    places = order[excess[order] >= excess[order[0]] / 2].tolist()
    more = f" and {len(places) - LISTED} more" if len(places) > LISTED else ""
    return (
        f"{word}{'s' if len(places) > 1 else ''} {', '.join(map(str, sorted(places[:LISTED])))}{more} of {len(excess)}"
    )


def _root(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole > 0 else math.sqrt(lost)
