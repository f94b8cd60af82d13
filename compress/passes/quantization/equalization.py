"""Equalisation: moves range from inputs into weights (or back) channel by channel, without changing what a layer gives.

    x_j -> x_j / s_j      W_nj -> W_nj s_j      s_j = max|x_j|^a / max_n|W_nj|^(1 - a)

(SmoothQuant, Xiao et al., arXiv 2211.10438.) The factors are rounded to powers of two, so that folding 1 / s_j into the
norm, or into the rows of the matrix that produces x, is exact in bfloat16 and float32 (in float16 but for subnormals): the
unquantized model stays bit for bit the same function.
"""

import torch

from compress.calibration.inputs import UnitInputs, Wanted
from compress.errors import InputError
from compress.model.block import Fold
from compress.model.records import Folded, packed
from compress.model.tensor_names import in_short
from compress.model.weight import Unit, Weight

MOST = 2.0**8  # no factor moves a channel further than this, either way


def factors(inputs: torch.Tensor, columns: torch.Tensor, strength: float) -> torch.Tensor:
    """Largest magnitudes of the inputs [K] and of the matrices' columns [K] -> powers of two [K]; 1 where either is 0."""
    raw = inputs.clamp(min=1e-30) ** strength / columns.clamp(min=1e-30) ** (1 - strength)
    usable = (inputs > 0) & (columns > 0)
    raw = raw / torch.exp(torch.log(raw[usable]).mean()) if bool(usable.any()) else raw  # geometric mean 1
    powers = torch.exp2(torch.round(torch.log2(raw.clamp(1 / MOST, MOST))))
    return torch.where(usable, powers, 1.0)


def equalize(unit: Unit, inputs: UnitInputs, strength: float) -> tuple[Unit, list[Folded]]:
    """The unit with every fold of its architecture applied, and a record of each that changed it; inputs are those of the
    unit as it is."""
    quantized = [weight.name for weight in unit.weights.values() if weight.is_quantized]
    if quantized:
        raise InputError(
            f"tensor '{quantized[0]}' is quantized by an earlier pass: equalize must be in the first that quantizes"
        )
    magnitudes, records = _input_magnitudes(unit, inputs) if inputs.folds() else {}, []
    for fold in inputs.folds():
        names = [inputs.prefix + name for name in fold.targets]
        known = [magnitudes[name] for name in names if name in magnitudes]
        columns = torch.stack([_column_absmax(unit.weights[name]) for name in names]).amax(0)
        found = factors(torch.stack(known).amax(0).cpu(), columns, strength)
        unit = _folded(unit, fold, inputs.prefix, found)
        records += _records(fold, inputs.prefix, found)
    return unit, records


def _records(fold: Fold, prefix: str, by: torch.Tensor) -> list[Folded]:
    """None where every factor is 1."""
    exponents = torch.log2(by).int().tolist()
    targets = in_short(prefix + name for name in (*fold.targets, *fold.others))
    return [Folded(source=prefix + fold.source, targets=targets, exponents=packed(exponents))] if any(exponents) else []


def _input_magnitudes(unit: Unit, inputs: UnitInputs) -> dict[str, torch.Tensor]:
    """Largest magnitude of every input channel, by the full name of the matrices it reaches."""
    found: dict[str, torch.Tensor] = {}
    for level in inputs.levels:
        for group, moments in inputs.moments(unit, level, Wanted()):
            found |= dict.fromkeys(inputs.full_names(group), moments.absmax)
    return found


def _column_absmax(weight: Weight) -> torch.Tensor:
    return torch.stack([weight.dense(rows).abs().amax(0) for rows in weight.row_blocks()]).amax(0)


def _folded(unit: Unit, fold: Fold, prefix: str, by: torch.Tensor) -> Unit:
    source = unit.weights[prefix + fold.source]
    unit = unit.replaced(scaled(source, 1 / by, dim=0))
    for name in (*fold.targets, *fold.others):
        unit = unit.replaced(scaled(unit.weights[prefix + name], by, dim=1))
    return unit


def scaled(weight: Weight, by: torch.Tensor, dim: int) -> Weight:
    """A plain weight with rows (dim 0) or columns (dim 1) multiplied by powers of two, in its own format."""

    def load(rows: slice | None = None) -> torch.Tensor:
        stored = weight.load(rows)
        assert isinstance(stored, torch.Tensor), "a quantized matrix is refused before"
        factor = (by[rows] if rows else by).view(-1, *[1] * (stored.dim() - 1)) if dim == 0 else by
        return stored * factor.to(stored.dtype)

    return weight.with_load(weight.format, load)
