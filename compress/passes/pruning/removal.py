"""A layer with some of its experts: their matrices renumbered, the router's rows to match."""

from dataclasses import replace

import torch

from compress.calibration.inputs import LayerInputs
from compress.model.roles import Role
from compress.model.weight import Unit, Weight
from compress.passes.pruning.reconstruction import Kept, router_order


def keep(unit: Unit, inputs: LayerInputs, kept: Kept, *, keep_rows: bool) -> Unit:
    """The unit with the experts `kept` as 0, 1, ...; with `keep_rows` the router's other rows follow those of the kept."""
    experts = inputs.architecture.num_experts(inputs.config, inputs.index)
    order = router_order(kept, experts, keep_rows=keep_rows)
    router = inputs.prefix + inputs.architecture.ROUTER
    weights: dict[str, Weight] = {}
    for name, weight in unit.weights.items():
        if weight.role != Role.EXPERTS:
            weights[name] = _reordered(weight, order) if name == router else weight
    for position, expert in enumerate(kept):
        for part in expert_weights(unit, inputs, expert):
            name = expert_stem(inputs, position) + part.name.removeprefix(expert_stem(inputs, expert))
            weights[name] = replace(part, name=name)
    return Unit(unit.name, weights)


def expert_stem(inputs: LayerInputs, expert: int) -> str:
    """What the full names of an expert's tensors begin with."""
    return inputs.prefix + inputs.architecture.expert_prefix(expert)


def expert_weights(unit: Unit, inputs: LayerInputs, expert: int) -> list[Weight]:
    return [weight for name, weight in unit.weights.items() if name.startswith(expert_stem(inputs, expert))]


def _reordered(router: Weight, order: list[int]) -> Weight:
    def load(rows: slice | None = None) -> torch.Tensor:
        return router.load(None)[order][rows or slice(None)]

    return replace(router, shape=(len(order), router.shape[1]), load=load)
