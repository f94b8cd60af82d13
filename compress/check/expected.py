"""What a candidate's formats are expected to cost, told from the artifact itself: a mean divergence from the original, in nats.

What rounding costs is close to the sum of what each role costs alone (docs/quantization.md), so it is summed up from a table
(`costs.py`): of every role by the format of its matrices and the method that rounded them, of their inputs, of experts that
were removed, of states. Roles that stand in several formats take the square root of each format's share of their parameters: the
costliest layers of a role cost several times the mean, and may be those that have the coarser format.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from compress import formats
from compress.check import costs
from compress.check.costs import FUSED, Costs
from compress.checkpoint import compressed_tensors
from compress.checkpoint.compressed_tensors import Scheme
from compress.model import records
from compress.model.hybrid import HybridModel
from compress.model.records import Recomputed, Record, Rounded
from compress.model.roles import QUANTIZABLE, Role
from compress.model.states import SCALE_AXES, StateKind, StateSpec
from compress.model.tensor_names import written_out
from compress.runtime.artifacts import Artifact

ROTATED = " rotated"
SAMPLE = (64, 512)  # of normal numbers, on which a format that nobody measured is compared with int8


@dataclass(frozen=True)
class Expected:
    """Mean divergences: of weights, of inputs that are rounded, of states, which only decoding sees, and of hidden states that are
    in 16 bits. `tail` is how many
    times the mean the 99th percentile is at most, `apart` how far decoding and reading at once are: half the mean square, at most,
    of what lies between the log-probabilities of tokens. `prunes`: whether experts were removed, which is among what weights
    cost."""

    weights: float = 0.0
    inputs: float = 0.0
    states: float = 0.0
    tail: float = 0.0
    apart: float = 0.0
    prunes: bool = False
    hidden: float = 0.0

    def __add__(self, other: "Expected") -> "Expected":
        sums = (self.weights + other.weights, self.inputs + other.inputs, self.states + other.states)
        prunes, hidden = self.prunes or other.prunes, self.hidden + other.hidden
        return Expected(*sums, max(self.tail, other.tail), self.apart + other.apart, prunes, hidden)


class Form(NamedTuple):
    """How a state is kept."""

    format: str
    rounding: str
    scale: str


class Stored(NamedTuple):
    """How matrices of a role are stored."""

    role: Role
    format: str
    is_compensated: bool  # by GPTQ
    inputs: str | None


def expected(original: Artifact, candidate: Artifact) -> Expected:
    """Of the candidate beside the original, which may be compressed itself: neither knows of the other's errors."""
    before, after = original.model(), candidate.model()
    known = costs.of_family(after.model_type)
    casts, pruned = Expected(_of_casts(before, after, known)), _of_pruning(before, after, known)
    return _of_one(before, original, known) + _of_one(after, candidate, known) + casts + pruned


def _of_one(model: HybridModel, artifact: Artifact, known: Costs) -> Expected:
    """What it costs beside a model that nothing was done to."""
    parameters, of_role = Counter[Stored](), Counter[Role]()
    for kind, count in _kinds(model, artifact):
        parameters[kind] += count
        of_role[kind.role] += count
    shares = {kind: math.sqrt(count / of_role[kind.role]) for kind, count in parameters.items()}
    inputs, states = _of_inputs(shares, known), _of_states(model, known)
    hidden = _of_hidden(artifact.bodies, known)
    apart = sum(known.apart_of(form) ** 2 * cost for form, cost in inputs.items())
    apart += costs.APART**2 * states + costs.HIDDEN_APART**2 * hidden
    return Expected(_of_rounding(shares, known), sum(inputs.values()), states, known.tail, apart, hidden=hidden)


def _of_hidden(bodies: Mapping[str, int], known: Costs) -> float:
    """Of what lies between the matrices, by the share of the blocks; states that are in the same type are among it."""
    blocks = sum(bodies.values())
    return sum(math.sqrt(count / blocks) * known.hidden[form] for form, count in bodies.items())


def _of_rounding(shares: Mapping[Stored, float], known: Costs) -> float:
    """Of matrices that are stored so, each kind by its share of its role."""
    alone, rounded = defaultdict[str, float](float), defaultdict[str, float](float)
    for kind, share in shares.items():
        if kind.format not in formats.PLAIN:
            base, factor = known.formats.get(kind.format) or ("int8", _noise(kind.format) / _noise("int8"))
            cost = share * known.weights_of(kind.role, base)
            rounded[base] += cost
            alone[base] += cost * factor * (known.compensated[base] if kind.is_compensated else 1.0)
    return sum(known.weights_at_once(base, cost, rounded[base]) for base, cost in alone.items())


def _of_inputs(shares: Mapping[Stored, float], known: Costs) -> dict[str, float]:
    """By how they are rounded."""
    alone, fused = defaultdict[str, float](float), defaultdict[str, float](float)
    for kind, share in shares.items():
        if kind.inputs is not None:
            form = kind.inputs.removesuffix(ROTATED)
            alone[form] += share * known.inputs_of(kind.role, kind.inputs)
            fused[form] += share * known.inputs_of(kind.role, FUSED)
    return {form: known.inputs_at_once(form, cost, fused[form]) for form, cost in alone.items()}


def _kinds(model: HybridModel, artifact: Artifact) -> Iterator[tuple[Stored, int]]:
    """Of every matrix, with its parameters; a tied table is looked up, and is the output matrix too."""
    is_fused = artifact.runtime == "onnxruntime" and not artifact.bodies
    schemes, compensated = _schemes(model, artifact.folder), set(_compensated(model.config.compress.passes))
    for weight in model.weights:
        if weight.role in QUANTIZABLE:
            is_tied = weight.role == Role.EMBEDDING and model.is_tied
            for role in (Role.EMBEDDING, Role.LM_HEAD) if is_tied else (weight.role,):
                inputs = _inputs(role, weight.format, schemes.get(weight.name), is_fused)
                yield Stored(role, weight.format, weight.name in compensated, inputs), weight.parameters


def _schemes(model: HybridModel, folder: Path) -> dict[str, Scheme]:
    """What config.json says of the inputs of matrices, which a graph's weights do not."""
    if model.config_json.get("quantization_config") is None:
        return {}
    quantized = (weight.name for weight in model.weights if weight.is_quantized)
    return compressed_tensors.schemes_of(model.config_json, folder, {f"{name}_scale" for name in quantized})


def _compensated(passes: tuple[Record, ...]) -> Iterator[str]:
    for record in passes:
        for change in record.changes or ():
            if isinstance(change, Rounded) and change.method == "gptq":
                yield from written_out(change.tensors)


def _inputs(role: Role, number_format: str, scheme: Scheme | None, is_fused: bool) -> str | None:
    """How what is multiplied with a matrix is rounded, which is fused with packed integers by onnxruntime; nothing is multiplied
    with a table."""
    if scheme is None or role == Role.EMBEDDING:
        return None
    if scheme.activation is None:
        return FUSED if is_fused and compressed_tensors.is_integer(number_format) else None
    return scheme.activation + (ROTATED if scheme.rotation and scheme.activation == "static-int8" else "")


def _noise(number_format: str) -> float:
    """Mean squared error of normal numbers rounded to nearest: what rounding costs grows with it."""
    numbers, found = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0)), formats.get(number_format)
    return float((found.dequantize(found.quantize(numbers)) - numbers).square().mean())


def _of_casts(before: HybridModel, after: HybridModel, known: Costs) -> float:
    """Of matrices in a narrower plain type than the original's."""
    came = {weight.name: weight.format for weight in before.weights}
    cast = {(w.role, w.format) for w in after.weights if w.role in QUANTIZABLE and _is_cast(came.get(w.name), w.format)}
    return sum(known.weights_of(role, "int8") * costs.CASTS[number_format] for role, number_format in cast)


def _is_cast(came: str | None, now: str) -> bool:
    return came in formats.PLAIN and now in costs.CASTS and came != now


def _of_pruning(before: HybridModel, after: HybridModel, known: Costs) -> Expected:
    """Whichever of the two has fewer experts lost some."""
    fewer, more = sorted((before, after), key=_experts)
    removed = 1 - _experts(fewer) / _experts(more)
    if removed == 0:
        return Expected()
    changes = [change for record in fewer.config.compress.passes for change in record.changes or ()]
    corrected = any(isinstance(change, Recomputed) and change.by == "least_squares" for change in changes)
    return Expected(known.pruned(removed, corrected), prunes=True)


def _experts(model: HybridModel) -> int:
    """Of all layers that have some; 1 in a model without, so that none are missing."""
    return sum(layer.num_experts for layer in model.layers if layer.experts) or 1


def _of_states(model: HybridModel, known: Costs) -> float:
    """Of what a pass decided on; states that were given other formats without one are not expected to cost anything."""
    if not records.decided_states(model.config.compress.passes):
        return 0.0
    having, kept = Counter[StateKind](), Counter[tuple[StateKind, Form]]()
    for layer in model.layers:
        having.update({spec.kind for spec in layer.states})
        kept.update({(spec.kind, _form(spec)) for spec in layer.states if spec.name in layer.precisions})
    return sum(math.sqrt(count / having[kind]) * known.states_of(kind, *form) for (kind, form), count in kept.items())


def _form(spec: StateSpec) -> Form:
    """What feedback and a cadence save is not taken into account, nor what blocks do."""
    kept = spec.precision
    along = "dynamic" if kept.axis == SCALE_AXES[spec.kind] else "d_inner"
    scale = "none" if kept.is_plain else "static" if kept.has_static_scale else along
    return Form(kept.format, "stochastic" if kept.rounding == "stochastic" else "nearest", scale)
