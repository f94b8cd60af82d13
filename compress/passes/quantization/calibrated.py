"""Quantizes one unit with regard to what reaches its matrices: GPTQ, static activations, equalisation.

Level by level: the matrices of a level are quantized from the inputs that the earlier, already quantized ones give, then
written, and read back before anything runs through them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from compress import formats
from compress.calibration.inputs import LayerInputs, UnitInputs, Wanted
from compress.calibration.moments import Moments
from compress.formats.activations import Activation, static_scale
from compress.formats.base import NumberFormat, Quantized
from compress.model.block import InputGroup
from compress.model.records import Folded
from compress.model.tensor_names import in_short
from compress.model.weight import Unit, Weight
from compress.passes import Note
from compress.passes.quantization import equalization, gptq, rounding
from compress.passes.quantize import Options
from compress.strict.json_text import Json


def quantize(options: Options, unit: Unit, inputs: UnitInputs, device: str) -> tuple[Unit, Note]:
    """The unit as the options of the `quantize` pass want it, and a note: tokens per expert, experts that had too few, what
    was done to its tensors."""
    folds: list[Folded] = []
    if options.equalize is not None:
        unit, folds = equalization.equalize(unit, inputs, options.equalize)
    planned = unit.map(lambda weight: rounding.lazily(weight, options, device))
    # what this pass quantizes: not what it leaves plain, nor what an earlier pass has quantized
    mine = {n: weight for n, weight in planned.weights.items() if weight.is_quantized and weight is not unit.weights[n]}
    quantizer = _Quantizer(options, mine, inputs, _wanted(options, list(mine.values())), device)
    for level in inputs.levels:
        unit = quantizer.level(unit, level)
    rest = {name: weight for name, weight in planned.weights.items() if not unit.weights[name].is_quantized}
    note: dict[str, Sequence[Json]] = {
        **quantizer.note,
        "folds": [fold.model_dump() for fold in folds],
        "gptq": in_short(quantizer.compensated),
    }
    return Unit(unit.name, unit.weights | rest), {key: values for key, values in note.items() if values}


def _wanted(options: Options, weights: list[Weight]) -> Wanted:
    rotations = {weight.name: weight.rotation for weight in weights if weight.rotation}
    is_static = any(weight.activation and weight.activation.is_static for weight in weights)
    return Wanted(options.method == "gptq", is_static and options.activation_range != "minmax", rotations)


@dataclass
class _Quantizer:
    """Quantizes the matrices in `planned` (by full name, rounded to nearest so far), level by level."""

    options: Options
    planned: dict[str, Weight]
    inputs: UnitInputs
    wanted: Wanted
    device: str
    note: dict[str, list[dict[str, Json]]] = field(
        default_factory=lambda: {"experts": [], "experts_from_every_token": []}
    )
    compensated: list[str] = field(default_factory=list)  # matrices whose errors were compensated for

    def level(self, unit: Unit, groups: tuple[InputGroup, ...]) -> Unit:
        """The unit with the matrices of one level quantized, written and read back."""
        calibrated = tuple(group for group in groups if self._needs_inputs(group))
        for group in groups:
            if group not in calibrated:  # rounded without regard to its inputs; later levels see what came of it
                for name in self._names(group):
                    unit = unit.replaced(self.inputs.keep(self.planned[name]))
        for group, moments in self.inputs.moments(unit, calibrated, self.wanted) if calibrated else ():
            moments = self._enough(unit, group, moments)
            factor = self._factor(moments)
            for name in self._names(group):
                found = self._quantized(unit.weights[name], self.planned[name], moments, factor)
                unit = unit.replaced(self.inputs.keep(found))
        return unit

    def _names(self, group: InputGroup) -> list[str]:
        return [name for name in self.inputs.full_names(group) if name in self.planned]

    def _needs_inputs(self, group: InputGroup) -> bool:
        weights = [self.planned[name] for name in self._names(group)]
        return any(self.options.method == "gptq" or (w.activation and w.activation.is_static) for w in weights)

    def _enough(self, unit: Unit, group: InputGroup, moments: Moments) -> Moments:
        """The moments, or, for an expert that saw fewer than `min_tokens`, those of every token of the layer."""
        if group.expert is None or not isinstance(self.inputs, LayerInputs):
            return moments
        entry: dict[str, Json] = {"layer": self.inputs.index, "expert": group.expert, "tokens": moments.tokens}
        if entry not in self.note["experts"]:
            self.note["experts"].append(entry)
        if moments.tokens >= self.options.min_tokens:
            return moments
        pooled = self.inputs.moments_of_every_token(unit, group, self.wanted)
        used: dict[str, Json] = {"matrices": list(group.names), "tokens_used": pooled.tokens}
        self.note["experts_from_every_token"].append(entry | used)
        return pooled

    def _factor(self, moments: Moments) -> gptq.Factor | None:
        """What the matrices of a group share, found once."""
        if self.options.method != "gptq":
            return None
        return gptq.factor(moments.hessian, damping=self.options.damping, act_order=self.options.act_order)

    def _quantized(self, weight: Weight, planned: Weight, moments: Moments, factor: gptq.Factor | None) -> Weight:
        """One matrix in its planned format, from its inputs' moments."""
        options, activation = self.options, self._with_range(planned.activation, moments)
        if factor is None:
            return replace(planned, activation=activation)
        number_format = formats.get(planned.format)
        dense = rounding.stored_basis(weight, planned.rotation, self.device)
        search = rounding.search_for(number_format, options.clip == "mse", moments.square)
        scales = number_format.join_scales([search(dense)])
        found = gptq.quantize(dense, factor, number_format, scales)
        self.compensated.append(planned.name)
        return replace(planned, load=_rows_of(found, number_format), activation=activation)

    def _with_range(self, activation: Activation | None, moments: Moments) -> Activation | None:
        """A static activation with its scale."""
        if activation is None or not activation.is_static:
            return activation
        method, percentile = self.options.activation_range, self.options.percentile
        scale = static_scale(moments.sample, float(moments.absmax.max()), activation.is_fp8, method, percentile)
        return Activation(activation.format, lambda: scale)


def _rows_of(quantized: Quantized, number_format: NumberFormat) -> Callable[[slice | None], Quantized]:
    """A loader of blocks of rows of a matrix that is in memory."""

    def load(rows: slice | None = None) -> Quantized:
        if rows is None:
            return quantized
        return Quantized(quantized.values[rows], number_format.scales_of(quantized.scales, rows), quantized.format)

    return load
