"""Quantizes one unit with regard to what reaches its matrices: GPTQ, static activations, equalisation.

Level by level: the matrices of a level are quantized from the inputs that the earlier, already quantized ones give, then
written, and read back before anything runs through them.
"""

from dataclasses import replace

from compress import formats
from compress.calibration.inputs import UnitInputs, Wanted
from compress.calibration.moments import Moments
from compress.formats.base import Quantized
from compress.model import InputGroup, Unit, Weight
from compress.quantization import equalization, gptq, rounding
from compress.quantization.activations import Activation, static_scale


def quantize(options, unit: Unit, inputs: UnitInputs, device: str) -> tuple[Unit, dict]:
    """The unit as the options of the `quantize` pass want it, and a note: tokens per expert, experts that had too few."""
    if options.equalize is not None:
        unit = equalization.equalize(unit, inputs, options.equalize)
    planned = unit.map(lambda weight: rounding.lazily(weight, options, device))
    # what this pass quantizes: not what it leaves plain, nor what an earlier pass has quantized
    mine = {n for n, weight in planned.weights.items() if weight.is_quantized and weight is not unit.weights[n]}
    wanted = _wanted(options, [planned.weights[name] for name in mine])
    note: dict[str, list] = {"experts": [], "experts_from_every_token": []}
    for level in inputs.levels:
        names = {group: tuple(name for name in inputs.full_names(group) if name in mine) for group in level}
        groups = tuple(g for g in level if _needs_inputs([planned.weights[name] for name in names[g]], options))
        for name in (name for group in level if group not in groups for name in names[group]):
            unit = unit.replaced(
                inputs.keep(planned.weights[name])
            )  # without regard to its inputs; later levels see it
        for group, moments in inputs.moments(unit, groups, wanted) if groups else ():
            moments = _enough(options, unit, inputs, group, moments, wanted, note)
            for name in names[group]:
                kept = inputs.keep(_quantized(options, unit.weights[name], planned.weights[name], moments, device))
                unit = unit.replaced(kept)
    rest = {name: weight for name, weight in planned.weights.items() if not unit.weights[name].is_quantized}
    return Unit(unit.name, unit.weights | rest), {key: values for key, values in note.items() if values}


def _wanted(options, weights: list[Weight]) -> Wanted:
    rotations = {weight.name: weight.rotation for weight in weights if weight.rotation}
    is_static = any(weight.activation and weight.activation.is_static for weight in weights)
    return Wanted(options.method == "gptq", is_static and options.activation_range != "minmax", rotations)


def _needs_inputs(weights: list[Weight], options) -> bool:
    return any(options.method == "gptq" or (w.activation and w.activation.is_static) for w in weights)


def _enough(options, unit: Unit, inputs: UnitInputs, group: InputGroup, moments: Moments, wanted: Wanted,
            note: dict[str, list]) -> Moments:  # fmt: skip
    """The moments, or, for an expert that saw fewer than `min_tokens`, those of every token of the layer."""
    if group.expert is None:
        return moments
    entry = {"layer": inputs.index, "expert": group.expert, "tokens": moments.tokens}
    if entry not in note["experts"]:
        note["experts"].append(entry)
    if moments.tokens >= options.min_tokens:
        return moments
    pooled = inputs.moments_of_every_token(unit, group, wanted)
    note["experts_from_every_token"].append({**entry, "matrices": list(group.names), "tokens_used": pooled.tokens})
    return pooled


def _quantized(options, weight: Weight, planned: Weight, moments: Moments, device: str) -> Weight:
    """One matrix in its planned format, from its inputs' moments."""
    activation = planned.activation
    if activation and activation.is_static:
        method, percentile = options.activation_range, options.percentile
        scale = static_scale(moments.sample, float(moments.absmax.max()), activation.is_fp8, method, percentile)
        activation = Activation(activation.format, lambda: scale)
    if options.method != "gptq":
        return replace(planned, activation=activation)
    number_format, dense = formats.get(planned.format), rounding.stored_basis(weight, planned.rotation, device)
    search = rounding.search_for(number_format, options.clips(), moments.square)
    scales = number_format.join_scales([search(dense)])
    found = gptq.quantize(
        dense, moments.hessian, number_format, scales, damping=options.damping, act_order=options.act_order
    )
    return replace(planned, load=_rows_of(found, number_format.rows), activation=activation)


def _rows_of(quantized: Quantized, step: int | None):
    """A loader of blocks of rows of a matrix that is in memory."""

    def load(rows: slice | None = None) -> Quantized:
        if rows is None:
            return quantized
        scales = quantized.scales
        if step is not None:
            scales = scales[rows.start // step : -(-rows.stop // step)]
        return Quantized(quantized.values[rows], scales, quantized.format)

    return load
