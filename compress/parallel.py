"""Work shared among threads, in pieces that do not depend on how many there are: the same bytes on any machine.

torch cuts sums and vector loops into as many parts as it has threads, so the last digits of a Cholesky factor, a sum or
a softplus depend on that number, and with them what is rounded later. Where `steady` is in force, torch computes on one
thread, and the threads it had take pieces of the work instead. Where a piece ends is decided by shapes alone.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, ContextVar
from typing import TypeVar

import torch
import torch.nn.functional as F

PIECE = 1 << 27  # multiplications of a piece of a product, at least: far more time than handing it over takes
LEAST_ROWS = 512  # of a piece of a product: fewer would keep the matrix unit waiting for memory
TILE = 512  # rows and columns of a piece of a matrix that is summed or factored, at most

Item = TypeVar("Item")
Result = TypeVar("Result")
_threads: ContextVar[ThreadPoolExecutor | None] = ContextVar("threads", default=None)


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Results do not depend on the number of threads that torch has now, which it has again afterwards. May be nested."""
    if _threads.get() is not None:
        yield
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "compress", initializer=torch.set_num_threads, initargs=(1,))
    token = _threads.set(pool)
    try:
        torch.set_num_threads(1)
        yield
    finally:
        _threads.reset(token)
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def each(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """[function(item) for item in items], side by side where `steady` is in force. What fails first is raised.

    Pieces are not cut further: on any number of threads a function runs as if `steady` were not in force.
    """
    items, pool = list(items), _threads.get()
    if pool is None or len(items) < 2:
        return [function(item) for item in items]
    is_inference = torch.is_inference_mode_enabled()

    def run(item: Item) -> Result:
        with torch.inference_mode(is_inference):  # a setting of each thread
            return Context().run(function, item)

    return list(pool.map(run, items))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] times the transpose of weight [N, K], plus bias [N]."""
    rows, outputs = x.reshape(-1, x.shape[-1]), len(weight)
    tokens = slices(len(rows), max(LEAST_ROWS, PIECE // weight.numel()))
    columns = slices(outputs, max(LEAST_ROWS, PIECE // max(1, rows.numel())))
    if not _cuts(x) or (len(tokens) < 2 and len(columns) < 2):
        return F.linear(x, weight, bias)
    whole = slice(0, outputs)
    result = torch.empty(len(rows), outputs, dtype=x.dtype)

    def fill(piece: tuple[slice, slice]) -> None:
        part = None if bias is None else bias[piece[1]]
        result[piece] = F.linear(rows[piece[0]], weight[piece[1]], part)

    each(fill, [(t, whole) for t in tokens] if len(tokens) > 1 else [(tokens[0], c) for c in columns])
    return result.view(*x.shape[:-1], outputs)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total [M, N] += a' b for a [T, M] and b [T, N]."""
    _add_tiles(total, a, b, [(r, c) for r in slices(len(total), TILE) for c in slices(total.shape[1], TILE)])


def add_moments(total: torch.Tensor, x: torch.Tensor) -> None:
    """total [K, K] += x' x for x [T, K], in the lower triangle only: `mirror` gives the whole."""
    _add_tiles(total, x, x, [(r, c) for r in slices(len(total), TILE) for c in slices(r.stop, TILE)])


@torch.inference_mode()
def mirror(total: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix [K, K] of that lower triangle, in its own place: it may be the largest there is."""
    return total.tril_().add_(total.tril(-1).T)


def _add_tiles(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, tiles: list[tuple[slice, slice]]) -> None:
    if not _cuts(total):
        total.addmm_(a.T, b)
        return
    each(lambda tile: total[tile].addmm_(a[:, tile[0]].T, b[:, tile[1]]), tiles)


def _cuts(tensor: torch.Tensor) -> bool:
    return _threads.get() is not None and tensor.device.type == "cpu"


def slices(stop: int, most: int, start: int = 0) -> list[slice]:
    """start .. stop in slices of `most`, the last one shorter."""
    return [slice(first, min(first + most, stop)) for first in range(start, stop, most)]
