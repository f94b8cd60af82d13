"""Logits in pieces: of a long window, [tokens, vocabulary] is never whole in memory."""

from collections.abc import Iterator

import torch

from compress.parallel import slices
from compress.runtime.inference import Head

HEAD_BYTES = (
    128 << 20
)  # of logits computed together: an output matrix that does not stay in memory is read anew for each
PIECE_BYTES = 16 << 20  # of logits handed on together: what compares them makes several tensors of that size
ROWS = 256  # and no more positions than these

Piece = tuple[int, int, torch.Tensor]  # window, first position, logits [n, V]


def rows_within(size: int, vocab_size: int) -> int:
    """Positions whose logits take at most so many bytes; at least one."""
    return max(1, min(ROWS, size // (4 * vocab_size)))


def cut(window: int, first: int, logits: torch.Tensor) -> Iterator[Piece]:
    """The logits [n, V] of consecutive positions in pieces: copies, so that the memory of all need not wait for the last."""
    for rows in slices(len(logits), rows_within(PIECE_BYTES, logits.shape[1])):
        yield window, first + rows.start, logits[rows].clone()


@torch.inference_mode()
def of_hidden(head: Head, window: int, hidden: torch.Tensor, first: int = 0) -> Iterator[Piece]:
    """From the final states [S, H] of a window, of the positions from `first` on but the last, which nothing follows."""
    scored = hidden[first:-1]
    for rows in slices(len(scored), rows_within(HEAD_BYTES, head.vocab_size)):
        yield from cut(window, first + rows.start, head(scored[rows]).cpu())
