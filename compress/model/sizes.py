"""What a model weighs: parameters, bytes of weights, bytes of state per sequence and per token."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from compress.model.architecture import Architecture
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.model.states import StateKind
from compress.model.weight import Spec, Unit, UnitSpec, Weight

# from a configuration alone: float32 SSM state, bfloat16 convolution state and KV, as the usual runtimes have them
USUAL_BYTES = {StateKind.SSM: 4, StateKind.CONV: 2, StateKind.KV: 2}

NAMED = 8  # tensors that a sentence names


@dataclass(frozen=True)
class StateBytes:
    """Per sequence; `kv_bytes_per_token` grows with the context."""

    kv_bytes_per_token: int
    ssm_state_bytes: int
    conv_state_bytes: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)


def state_bytes(architecture: Architecture) -> StateBytes:
    """From the configuration alone."""
    found = dict.fromkeys(StateKind, 0)
    for layer in architecture.layers:
        for spec in layer.states:
            found[spec.kind] += spec.elements() * USUAL_BYTES[spec.kind]
    return StateBytes(found[StateKind.KV], found[StateKind.SSM], found[StateKind.CONV])


def active_parameters(architecture: Architecture, units: Iterable[Unit | UnitSpec]) -> int:
    """Parameters that work on one token: top-k of the experts, everything else whole."""
    layers = {f"layer.{layer.index}": layer for layer in architecture.layers}

    def share(unit: Unit | UnitSpec, role: Role) -> float:
        return layers[unit.name].active_share(role) if unit.name in layers else float(role != Role.MTP)

    return round(sum(share(unit, item.role) * math.prod(item.shape) for unit, item in _items(units)))


def total_parameters(units: Iterable[Unit | UnitSpec]) -> int:
    return sum(math.prod(item.shape) for _, item in _items(units))


def travelling(model: HybridModel) -> list[str]:
    """A sentence where a model has tensors that nothing here runs."""
    names, count = [weight.name for weight in model.travellers], sum(weight.parameters for weight in model.travellers)
    if not names:
        return []
    few = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return [f"{len(names)} tensors that nothing here runs travel as they came, {count:,} parameters: {few}."]


def parameters_by_format(weights: Iterable[Weight]) -> dict[str, int]:
    """By the number format they are stored in."""
    counts: dict[str, int] = {}
    for weight in weights:
        counts[weight.format] = counts.get(weight.format, 0) + weight.parameters
    return counts


def parameters_by_role(units: Iterable[Unit | UnitSpec]) -> dict[Role, int]:
    totals: dict[Role, int] = {}
    for _, item in _items(units):
        totals[item.role] = totals.get(item.role, 0) + math.prod(item.shape)
    return totals


def _items(units: Iterable[Unit | UnitSpec]) -> Iterator[tuple[Unit | UnitSpec, Spec | Weight]]:
    """Every tensor with its unit, of unit specs and of opened units alike."""
    for unit in units:
        for item in unit.specs if isinstance(unit, UnitSpec) else unit.weights.values():
            yield unit, item


def stored_bytes(units: Iterable[Unit]) -> int:
    return sum(unit.stored_bytes() for unit in units)
