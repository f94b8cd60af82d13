"""What each tensor of a compressed model ought to be, told from the original and from what `compress.passes` says was done."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Literal

import torch

from compress.model.records import Change, Folded, Kept, Recomputed, Record, Rotated, Rounded, Rows, Scaled, unpacked
from compress.model.tensor_names import written_out
from compress.model.weight import PLAIN_DTYPES, Weight

Method = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class Ought:
    """A tensor as passes left it before it was rounded to the stored format. `weight` is None where the original has none of
    that kind; `follows` is false where values do not follow from the original's alone."""

    weight: Weight | None
    follows: bool = True
    method: Method | None = None  # of rounding, where a pass rounded it


Tensors = dict[str, Ought]


def replayed(original: Iterable[Weight], records: Sequence[Record]) -> Tensors:
    """Every tensor by the name it has after the passes, read lazily. A pass that does not tell what it did leaves nothing
    that follows from the original."""
    tensors: Tensors = {weight.name: Ought(weight) for weight in original}
    for record in records:
        if record.changes is None:
            tensors = {name: replace(ought, follows=False) for name, ought in tensors.items()}
        for change in record.changes or ():
            _change(change, tensors)
    return tensors


@singledispatch
def _change(change: Change, tensors: Tensors) -> None:
    raise TypeError(change)


@_change.register
def _(change: Kept, tensors: Tensors) -> None:
    came = {name: tensors.pop(name) for name in list(tensors) if name.startswith(change.stem)}
    merged = {group[0] for group in change.merged or ()}
    for new, old in enumerate(change.sources):
        start = f"{change.stem}{old}."
        for name in came:
            if name.startswith(start):
                now = f"{change.stem}{new}.{name.removeprefix(start)}"
                tensors[now] = replace(came[name], follows=came[name].follows and old not in merged)


@_change.register
def _(change: Rows, tensors: Tensors) -> None:
    for name in written_out(change.tensors):
        _replace(tensors, name, lambda weight: _with_rows(weight, change.rows))


@_change.register
def _(change: Scaled, tensors: Tensors) -> None:
    for name in written_out(change.tensors):
        _replace(tensors, name, lambda weight: _through(weight, lambda stored, rows: stored.float() * change.factor))


@_change.register
def _(change: Folded, tensors: Tensors) -> None:
    factors = torch.exp2(torch.tensor(unpacked(change.exponents), dtype=torch.float32))

    def of_source(stored: torch.Tensor, rows: slice | None) -> torch.Tensor:
        by = factors[rows or slice(None)]
        return stored.float() / by.view(-1, *[1] * (stored.dim() - 1))

    _replace(tensors, change.source, lambda weight: _through(weight, of_source))
    for name in written_out(change.targets):
        _replace(tensors, name, lambda weight: _through(weight, lambda stored, rows: stored.float() * factors))


@_change.register
def _(change: Recomputed, tensors: Tensors) -> None:
    for name in written_out(change.tensors):
        tensors[name] = replace(tensors.get(name, Ought(None)), follows=False)


@_change.register
def _(change: Rotated, tensors: Tensors) -> None:
    """Read in the model's own basis, such a matrix is what it was."""


@_change.register
def _(change: Rounded, tensors: Tensors) -> None:
    for name in written_out(change.tensors):
        if name in tensors:
            tensors[name] = replace(tensors[name], method=change.method)


def _replace(tensors: Tensors, name: str, make: Callable[[Weight], Weight]) -> None:
    ought = tensors.get(name, Ought(None))
    tensors[name] = replace(ought, weight=None if ought.weight is None else make(ought.weight))


def _through(weight: Weight, change: Callable[[torch.Tensor, slice | None], torch.Tensor]) -> Weight:
    """Rounded to the stored type again, as passes leave it."""
    dtype = PLAIN_DTYPES.get(weight.format, torch.float32)

    def load(rows: slice | None = None) -> torch.Tensor:
        return change(weight.dense(rows), rows).to(dtype)

    return weight.with_load(weight.format if dtype == PLAIN_DTYPES.get(weight.format) else "fp32", load)


def _with_rows(weight: Weight, rows: Sequence[int]) -> Weight:
    """Row i is what was row rows[i]."""
    picked = torch.tensor(rows)

    def load(wanted: slice | None = None) -> torch.Tensor:
        stored = weight.load(None)
        assert isinstance(stored, torch.Tensor), weight.name
        return stored[picked[wanted or slice(None)]]

    return replace(weight.with_load(weight.format, load), shape=(len(rows), *weight.shape[1:]))


def since(earlier: Sequence[Record], records: Sequence[Record]) -> Sequence[Record]:
    """What was done to a model that had these records already."""
    return records[len(earlier) :] if list(records[: len(earlier)]) == list(earlier) else records


def came_from(earlier: Sequence[Record], records: Sequence[Record]) -> bool:
    """Whether a model with these records can be told to be made of one with the earlier ones: of an original, or by passes after
    those. What passes did to two models alike does not make one of the other."""
    return not earlier or (len(records) > len(earlier) and list(records[: len(earlier)]) == list(earlier))
