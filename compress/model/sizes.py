"""What a model weighs: parameters, bytes of weights, bytes of state per sequence and per token."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import NotRequired, TypedDict

from compress.formats.remembered import Precision
from compress.model.architecture import Architecture
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.model.states import StateKind, StateSpec
from compress.model.weight import Spec, Unit, UnitSpec, Weight

# from a configuration alone: float32 SSM state, bfloat16 convolution state and KV, as the usual runtimes have them
USUAL_BYTES = {StateKind.SSM: 4, StateKind.CONV: 2, StateKind.KV: 2}

NAMED = 8  # tensors that a sentence names


CONTEXTS = (4096, 32_768, 262_144)  # tokens read, that memory is told at


class MemoryFacts(TypedDict):
    """Of one sequence: what does not grow, what every token adds, and the bytes `at` so many tokens."""

    bytes_per_sequence: int
    bytes_per_token: int
    at: dict[str, int]


class StateFacts(TypedDict):
    """How a kind of state is kept in a layer. Of a state that grows, `bytes_per_sequence` is that after `context` tokens."""

    layer: int
    kind: str
    format: str
    rounding: str
    residual: NotRequired[str]  # of error feedback
    scale: NotRequired[str]  # of formats with scales
    every: int  # tokens between two roundings
    bytes_per_sequence: int
    bytes_per_token: NotRequired[int]
    context: NotRequired[int]


@dataclass(frozen=True)
class StateBytes:
    """Per sequence; `kv_bytes_per_token` grows with the context."""

    kv_bytes_per_token: int
    ssm_state_bytes: int
    conv_state_bytes: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    def at(self, tokens: int) -> int:
        """Of a sequence after so many tokens."""
        return self.ssm_state_bytes + self.conv_state_bytes + tokens * self.kv_bytes_per_token

    def memory(self) -> dict[str, MemoryFacts]:
        """Of each kind, and of all together."""
        fixed, growing = {StateKind.SSM: self.ssm_state_bytes, StateKind.CONV: self.conv_state_bytes}, StateKind.KV
        facts = {str(kind): _memory(size, 0) for kind, size in fixed.items()}
        facts[str(growing)] = _memory(0, self.kv_bytes_per_token)
        return facts | {"total": _memory(sum(fixed.values()), self.kv_bytes_per_token)}


def _memory(fixed: int, per_token: int) -> MemoryFacts:
    at = {str(tokens): fixed + tokens * per_token for tokens in CONTEXTS}
    return {"bytes_per_sequence": fixed, "bytes_per_token": per_token, "at": at}


def state_bytes(architecture: Architecture) -> StateBytes:
    """From the configuration alone: states as its `compress.states` keeps them, others in the usual types."""
    found = dict.fromkeys(StateKind, 0)
    for layer in architecture.layers:
        for spec in layer.states:
            is_kept = spec.name in layer.precisions
            found[spec.kind] += spec.bytes() if is_kept else spec.elements() * USUAL_BYTES[spec.kind]
    return StateBytes(found[StateKind.KV], found[StateKind.SSM], found[StateKind.CONV])


def states_as_kept(architecture: Architecture) -> list[StateFacts]:
    """What `compress.states` says, a row for each layer and kind (more only where states of a kind differ)."""
    rows: dict[tuple[int, StateKind, Precision], list[StateSpec]] = {}
    for layer in architecture.layers:
        for spec in layer.states:
            if spec.name in layer.precisions:
                like = replace(spec.precision, seed=0)
                rows.setdefault((layer.index, spec.kind, like), []).append(spec)
    return [_row(layer, specs) for (layer, _, _), specs in rows.items()]


def _row(layer: int, specs: list[StateSpec]) -> StateFacts:
    kind, precision, grows = specs[0].kind, specs[0].precision, specs[0].grows is not None
    row: StateFacts = {
        "layer": layer,
        "kind": str(kind),
        "format": precision.format,
        "rounding": precision.rounding,
        "every": precision.every,
        "bytes_per_sequence": sum(spec.bytes(CONTEXTS[0]) for spec in specs),
    }
    if not precision.is_plain:
        row["scale"] = precision.scale
    if precision.residual is not None:
        row["residual"] = precision.residual
    if grows:
        row |= {"bytes_per_token": sum(spec.bytes() for spec in specs), "context": CONTEXTS[0]}
    return row


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
    """Every tensor with its unit, of unit specs and of opened units alike; scales are no parameters."""
    for unit in units:
        for item in unit.specs if isinstance(unit, UnitSpec) else unit.weights.values():
            if item.role != Role.STATE_SCALE:
                yield unit, item


def stored_bytes(units: Iterable[Unit]) -> int:
    return sum(unit.stored_bytes() for unit in units)
