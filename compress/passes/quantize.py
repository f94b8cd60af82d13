"""`quantize`: stores weights in the number format the recipe gives their role. Roles that must not lose precision
(`roles.KEPT_BY_DEFAULT`; docs/roles.md says why) stay as they came."""

from typing import Literal

from pydantic import Field, field_validator

from compress import formats
from compress.errors import InputError
from compress.roles import KEPT_BY_DEFAULT, QUANTIZABLE, Role
from compress.strict_model import KeyedError, Strict

WeightFormat = Literal[*formats.FILES, formats.AS_IT_CAME]


class Options(Strict):
    method: Literal["rtn"] = "rtn"  # round to nearest
    weights: WeightFormat = "int8"
    roles: dict[Role, WeightFormat] = Field(default_factory=dict)

    @field_validator("roles")
    @classmethod
    def _only_matrices(cls, roles: dict) -> dict:
        for role, format_name in roles.items():
            if role in KEPT_BY_DEFAULT and format_name != formats.AS_IT_CAME:
                choices = ", ".join(sorted(QUANTIZABLE))
                raise KeyedError(role, f"'{role}' always stays as it came; quantizable roles: {choices}")
        return roles

    def format_of(self, role: Role) -> str:
        default = formats.AS_IT_CAME if role in KEPT_BY_DEFAULT else self.weights
        return self.roles.get(role, default)


def requires(options: Options, model) -> None:
    """Refuses a recipe that names a role this model does not have."""
    present = {weight.role for weight in model.weights}
    absent = sorted(role for role in options.roles if role not in present)
    if absent:
        raise InputError(
            f"quantize.roles names '{absent[0]}', but the model has no such tensors; it has: {', '.join(sorted(present))}"
        )


def apply(options: Options, unit, context):
    """The unit with every weight its role's format applies to quantized on load."""
    return unit.map(lambda weight: _quantized(weight, options.format_of(weight.role), context.device))


def details(options: Options, units) -> dict:
    """What the report says: how many tensors and parameters each format holds."""
    by_format: dict[str, dict[str, int]] = {}
    for unit in units:
        for weight in unit.weights.values():
            entry = by_format.setdefault(weight.format, {"tensors": 0, "parameters": 0})
            entry["tensors"] += 1
            entry["parameters"] += weight.parameters
    return {"method": options.method, "formats": by_format}


def _quantized(weight, format_name: str, device: str):
    if format_name == formats.AS_IT_CAME or len(weight.shape) != 2:  # biases of a projection stay as they came
        return weight
    number_format = formats.get(format_name)

    def load(rows=None):
        return number_format.quantize(weight.dense(rows).to(device))

    return weight.with_load(format_name, load)
