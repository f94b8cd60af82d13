"""A layer with some of its experts: their matrices renumbered, the router's rows to match."""

from collections.abc import Callable
from dataclasses import replace

import torch

from compress.calibration.inputs import LayerInputs
from compress.model.roles import Role
from compress.model.weight import Unit, Weight
from compress.passes.pruning.reconstruction import Kept, router_order


def keep(unit: Unit, inputs: LayerInputs, kept: Kept, *, keep_rows: bool) -> Unit:
    """The unit with the experts `kept` as 0, 1, ...; with `keep_rows` the router's other rows follow those of the kept."""
    experts = inputs.experts
    order = router_order(kept, experts.count, keep_rows=keep_rows)
    rows = {experts.router.weight: order, experts.router.bias: list(kept)}
    renamed = {
        expert_stem(inputs, expert) + part: expert_stem(inputs, position) + part
        for position, expert in enumerate(kept)
        for part in experts.parts
    }
    weights: dict[str, Weight] = {}
    for name, weight in unit.weights.items():
        within = name.removeprefix(inputs.prefix)
        if name in renamed:
            weights[renamed[name]] = replace(weight, name=renamed[name])
        elif weight.role != Role.EXPERTS:
            weights[name] = _reordered(weight, rows[within]) if within in rows else weight
    return Unit(unit.name, weights)


def expert_stem(inputs: LayerInputs, expert: int) -> str:
    """What the full names of an expert's tensors begin with."""
    return inputs.prefix + inputs.experts.prefix(expert)


def rows_of(tensor: torch.Tensor) -> Callable[[slice | None], torch.Tensor]:
    """A loader of blocks of rows of a matrix that is in memory."""

    def load(rows: slice | None = None) -> torch.Tensor:
        return tensor[rows or slice(None)]

    return load


def _reordered(router: Weight, order: list[int]) -> Weight:
    """A router's matrix, or the correction of its scores, with some of its rows."""

    def load(rows: slice | None = None) -> torch.Tensor:
        stored = router.load(None)
        assert isinstance(stored, torch.Tensor), "no format quantizes a router"
        return stored[order][rows or slice(None)]

    return replace(router, shape=(len(order), *router.shape[1:]), load=load)
