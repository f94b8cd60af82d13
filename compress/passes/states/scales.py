"""Static scales of states: from the largest magnitudes that they reach on the calibration tokens."""

from collections.abc import Mapping

import torch

from compress.calibration.inputs import LayerInputs
from compress.formats import remembered
from compress.model.architecture import precision_of
from compress.model.roles import Role
from compress.model.states import StateSpec
from compress.model.weight import Unit, Weight
from compress.passes import Note
from compress.passes.pruning.removal import rows_of
from compress.passes.state_precision import Options
from compress.passes.states.deciding import decided
from compress.strict.json_text import Json


def found(options: Options, unit: Unit, inputs: LayerInputs) -> tuple[Unit, Note]:
    """The layer with the scales of its states that have static ones, and how far those states reach."""
    static = _static(options, inputs)
    reach = _reach(static, inputs, unit)
    notes: list[Json] = []
    for name, spec in static.items():
        scales = remembered.static_scales(reach[name].cpu(), spec.precision)
        full = inputs.prefix + spec.scale_name
        unit = unit.replaced(Weight(full, Role.STATE_SCALE, tuple(scales.shape), "fp32", rows_of(scales)))
        notes.append({"tensor": full, "largest": float(reach[name].max()), "smallest_scale": float(scales.min())})
    return unit, {"static": notes} if notes else {}


def _static(options: Options, inputs: LayerInputs) -> dict[str, StateSpec]:
    """The layer's states that get static scales, as they will be kept."""
    specs = {spec.name: spec for spec in inputs.layer.states}
    kept = {state.state: state for state in decided(options, inputs.layer, seed=0) if state.scale == "static"}
    return {name: specs[name].kept_in(precision_of(state, specs[name].kind)) for name, state in kept.items()}


def _reach(static: Mapping[str, StateSpec], inputs: LayerInputs, unit: Unit) -> dict[str, torch.Tensor]:
    """Of every entry of those states the largest magnitude; of a cache, over its tokens too."""
    reach: dict[str, torch.Tensor] = {}
    for states in inputs.remembered(unit, static):
        for name, state in states.items():
            grows = static[name].grows
            largest = state.abs().amax(0)
            largest = largest if grows is None else largest.amax(grows, keepdim=True)
            reach[name] = torch.maximum(reach[name], largest) if name in reach else largest
    return reach
