"""What `quantize` notes of a unit, and what the report says of the pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from compress import formats
from compress.model.records import Folded
from compress.model.roles import Role
from compress.passes import Coverage
from compress.strict.models import Strict
from compress.terminal.escaping import markdown

if TYPE_CHECKING:
    from compress.model.weight import Unit, Weight
    from compress.passes.quantize import Options

FROM_EVERY_TOKEN = "saw fewer tokens than min_tokens, and were calibrated on all of their layer"


class ExpertTokens(Strict):
    """Calibration tokens that reached an expert."""

    layer: int
    expert: int
    tokens: int


class FromEveryToken(ExpertTokens):
    """An expert that saw too few, and the tokens of its layer that were taken instead for some of its matrices."""

    matrices: list[str]
    tokens_used: int


class UnitNote(Strict):
    """Of a unit that was calibrated; `gptq` names the matrices whose errors were compensated for."""

    experts: tuple[ExpertTokens, ...] = ()
    experts_from_every_token: tuple[FromEveryToken, ...] = ()
    folds: tuple[Folded, ...] = ()
    gptq: tuple[str, ...] = ()


class Count(Strict):
    tensors: int = 0
    parameters: int = 0


class Replaced(Strict):
    """Matrices of a role and width whose format's groups do not divide K."""

    role: str
    asked: str
    stored: str
    inputs: int
    tensors: int


class QuantizeDetails(Strict):
    """What each format holds, what stands in for a format that does not fit, which experts saw too few tokens."""

    method: str
    formats: dict[str, Count]
    activations: dict[str, Count] | None = None
    rotated: int | None = None
    rounded_to_nearest: list[str] | None = None
    stored_otherwise: list[Replaced] | None = None
    experts: list[ExpertTokens] | None = None
    experts_from_every_token: list[FromEveryToken] | None = None


def details(options: Options, units: Sequence[Unit], notes: Sequence[UnitNote]) -> QuantizeDetails:
    weights = [weight for unit in units for weight in unit.weights.values()]
    return QuantizeDetails(
        method=options.method,
        formats=_counts((weight.format, weight) for weight in weights),
        activations=_counts((w.activation.format, w) for w in weights if w.activation) or None,
        rotated=sum(weight.rotation is not None for weight in weights) or None,
        rounded_to_nearest=_looked_up(options, weights),
        stored_otherwise=_replaced(options, weights) or None,
        experts=[entry for note in notes for entry in note.experts] or None,
        experts_from_every_token=[entry for note in notes for entry in note.experts_from_every_token] or None,
    )


def _looked_up(options: Options, weights: list[Weight]) -> list[str] | None:
    """An embedding that no output matrix is tied to is looked up: it has no inputs for GPTQ to compensate for."""
    if options.method != "gptq" or all(weight.role != Role.LM_HEAD for weight in weights):
        return None
    return [weight.name for weight in weights if weight.is_quantized and weight.role == Role.EMBEDDING]


def sentence(details: QuantizeDetails) -> str:
    parts = [f"Method {details.method}.", f"Stored as {_in_words(details.formats)}."]
    if details.activations:
        parts.append(f"Inputs rounded to {_in_words(details.activations)}.")
    if details.rotated:
        parts.append(f"Stored rotated: {details.rotated} tensors.")
    for name in details.rounded_to_nearest or ():
        parts.append(f"{markdown(name)} is rounded to nearest: it has no inputs to calibrate with.")
    for entry in details.stored_otherwise or ():
        parts.append(
            f"{entry.tensors} tensors of {entry.role} are {entry.stored}, not {entry.asked}, "
            f"which does not divide their {entry.inputs} inputs."
        )
    return " ".join(parts)


def coverage(details: QuantizeDetails) -> Coverage | None:
    if not details.experts:
        return None
    below = {f"layer {entry.layer} expert {entry.expert}" for entry in details.experts_from_every_token or ()}
    loads = dict[int, list[int]]()
    for entry in details.experts:
        loads.setdefault(entry.layer, []).append(entry.tokens)
    return Coverage(min(entry.tokens for entry in details.experts), tuple(sorted(below)), FROM_EVERY_TOKEN, loads)


def _counts(weights: Iterable[tuple[str, Weight]]) -> dict[str, Count]:
    counts: dict[str, Count] = {}
    for name, weight in weights:
        so_far = counts.get(name, Count())
        counts[name] = Count(tensors=so_far.tensors + 1, parameters=so_far.parameters + weight.parameters)
    return counts


def _replaced(options: Options, weights: Iterable[Weight]) -> list[Replaced]:
    """By role: what was asked for, what is stored, in how many tensors."""
    counts: Counter[tuple[str, str, str, int]] = Counter()
    for weight in weights:
        asked = options.format_for(weight)
        if weight.is_quantized and asked not in (weight.format, formats.AS_IT_CAME):
            counts[str(weight.role), asked, weight.format, weight.shape[1]] += 1
    return [
        Replaced(role=role, asked=asked, stored=stored, inputs=inputs, tensors=count)
        for (role, asked, stored, inputs), count in counts.items()
    ]


def _in_words(by_name: dict[str, Count]) -> str:
    return "; ".join(
        f"{name}: {count.tensors} tensors, {count.parameters:,} parameters" for name, count in sorted(by_name.items())
    )
