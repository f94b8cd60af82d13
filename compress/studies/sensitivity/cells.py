"""What is measured: a cell is the matrices of one role in one unit of the model, all in one format, all else as it came."""

from collections.abc import Iterator
from dataclasses import dataclass

from compress.errors import InputError, nearest
from compress.formats import AS_IT_CAME, NAMES
from compress.model.hybrid import HybridModel
from compress.model.names import layer_of
from compress.model.roles import Role
from compress.model.weight import Unit, Weight
from compress.passes.quantization import rounding
from compress.passes.quantize import Options

Key = frozenset[tuple[str, str]]  # (tensor, stored format) of everything that is altered


@dataclass(frozen=True)
class Cell:
    """`weights` quantize themselves when they are loaded; `formats.fitting` may have put another format in place."""

    unit: Unit
    role: Role
    format: str  # as asked
    weights: tuple[Weight, ...]

    @property
    def layer(self) -> int | None:
        """The layer's number; None for the embedding and the head."""
        return layer_of(next(iter(self.weights)).name)

    @property
    def stored(self) -> str:
        """The format really used; several joined with + where the matrices differ in their number of inputs."""
        return "+".join(sorted({weight.format for weight in self.weights}))

    @property
    def key(self) -> Key:
        return frozenset((weight.name, weight.format) for weight in self.weights)

    @property
    def parameters(self) -> int:
        return sum(weight.parameters for weight in self.weights)

    @property
    def bytes(self) -> int:
        """As stored, scales included."""
        return sum(weight.stored_bytes() for weight in self.weights)

    def tensors(self) -> Iterator["Cell"]:
        """A cell for each of its matrices."""
        return (Cell(self.unit, self.role, self.format, (weight,)) for weight in self.weights)

    def altered(self) -> Unit:
        """The unit with the cell's matrices quantized."""
        unit = self.unit
        for weight in self.weights:
            unit = unit.replaced(weight)
        return unit


def candidates(options: Options, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The formats to try: those given, else those that the recipe's quantize pass names, each once."""
    for name in asked:
        if name == AS_IT_CAME or name not in NAMES:
            raise InputError(f"--format {name}: is not a format to quantize in{nearest(name, {*NAMES} - {AS_IT_CAME})}")
    named = (options.weights, *options.roles.values(), *(override.weights for override in options.overrides))
    found = tuple(dict.fromkeys(name for name in asked or named if name != AS_IT_CAME))
    if not found:
        raise InputError("the recipe's quantize pass names no format but 'none'; name some with --format")
    return found


def of_formats(model: HybridModel, options: Options, formats: tuple[str, ...], device: str) -> list[Cell]:
    """Every unit and role in every format, with the scales that the recipe's pass would look for."""
    tried = {name: Options(weights=name, clip=options.clip) for name in formats}
    return [
        cell
        for unit in model.units
        for role in dict.fromkeys(weight.role for weight in unit.weights.values())
        for name, trial in tried.items()
        if (cell := _cell(unit, role, name, trial, device))
    ]


def of_recipe(model: HybridModel, options: Options, device: str) -> list[Cell]:
    """Every unit and role as the recipe's pass stores it; overrides may give its matrices different formats."""
    weights_only = options.model_copy(update={"activations": AS_IT_CAME, "activation_roles": {}})
    return [
        cell
        for unit in model.units
        for role in dict.fromkeys(weight.role for weight in unit.weights.values())
        if (cell := _cell(unit, role, "recipe", weights_only, device))
    ]


def _cell(unit: Unit, role: Role, name: str, options: Options, device: str) -> Cell | None:
    """None where the options leave all of the role's tensors as they came."""
    device = "cpu" if role == Role.EMBEDDING else device  # its rows are looked up on the host
    pairs = [(w, rounding.lazily(w, options, device)) for w in unit.weights.values() if w.role == role]
    quantized = tuple(new for old, new in pairs if new is not old)
    return Cell(unit, role, name, quantized) if quantized else None
