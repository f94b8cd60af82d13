"""`quantize`: stores weights, and where asked rounds activations, in the number format the recipe gives their role.

Roles that must not lose precision (`roles.KEPT_BY_DEFAULT`; docs/roles.md says why) stay as they came.
docs/quantization.md argues the defaults with figures.
"""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator, model_validator

from compress import formats
from compress.errors import InputError
from compress.model.names import layer_of
from compress.model.roles import ACTIVATED_BY_DEFAULT, KEPT_BY_DEFAULT, QUANTIZABLE, Role
from compress.strict.models import KeyedError, Number, Strict, WholeNumber

WeightFormat = Literal[*formats.NAMES]
ActivationFormat = Literal["none", "dynamic-int8", "static-int8", "dynamic-fp8", "static-fp8"]


def _always_kept(role: Role) -> str:
    return f"'{role}' always stays as it came; quantizable roles: {', '.join(sorted(QUANTIZABLE))}"


class Override(Strict):
    """A format for some matrices of a role: those of the given layers (all, where none are named) and projections."""

    role: Role
    layers: tuple[WholeNumber, ...] = ()
    projections: tuple[str, ...] = ()
    weights: WeightFormat

    @field_validator("role")
    @classmethod
    def _only_matrices(cls, role: Role) -> Role:
        if role in KEPT_BY_DEFAULT:
            raise ValueError(_always_kept(role))
        return role

    def parts(self) -> Iterator["Override"]:
        """One for every layer and projection that is named."""
        for layers in [(layer,) for layer in self.layers] or [()]:
            for projections in [(projection,) for projection in self.projections] or [()]:
                yield self.model_copy(update={"layers": layers, "projections": projections})

    def covers(self, weight) -> bool:
        """`projections` are the matrix's own name, such as `down_proj`: all experts of a layer are stored alike."""
        projection = weight.name.removesuffix(".weight").rpartition(".")[2]
        return (
            weight.role == self.role
            and (not self.layers or layer_of(weight.name) in self.layers)
            and (not self.projections or projection in self.projections)
        )


class Options(Strict):
    method: Literal["rtn", "gptq"] = "rtn"  # round to nearest, or with error compensation from calibration data
    weights: WeightFormat = "int8"
    roles: dict[Role, WeightFormat] = Field(default_factory=dict)
    overrides: tuple[Override, ...] = ()  # the first that covers a matrix wins over its role
    clip: Literal["none", "mse"] = "none"  # mse where the method is gptq and the recipe says nothing
    damping: Number = Field(default=0.01, gt=0, le=1)
    act_order: bool = True
    min_tokens: WholeNumber = Field(default=256, ge=1)
    activations: ActivationFormat = "none"
    activation_roles: dict[Role, ActivationFormat] = Field(default_factory=dict)
    activation_range: Literal["minmax", "percentile", "mse"] = "minmax"
    percentile: Number = Field(default=0.9999, gt=0.5, le=1)
    rotate: tuple[Role, ...] = ()  # roles whose input is rotated (Hadamard) before it is rounded
    equalize: Number | None = Field(default=None, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _clip_by_method(cls, given):
        """The default is written out: a resolved recipe says all that decides the weights."""
        if isinstance(given, dict) and given.get("method") == "gptq":
            return {"clip": "mse", **given}
        return given

    @field_validator("roles", "activation_roles")
    @classmethod
    def _only_matrices(cls, roles: dict) -> dict:
        for role, format_name in roles.items():
            if role in KEPT_BY_DEFAULT and format_name != formats.AS_IT_CAME:
                raise KeyedError(role, _always_kept(role))
        return roles

    def format_of(self, role: Role) -> str:
        default = formats.AS_IT_CAME if role in KEPT_BY_DEFAULT else self.weights
        return self.roles.get(role, default)

    def format_for(self, weight) -> str:
        """The format the recipe asks for; `formats.fitting` may put another in its place."""
        covering = (override.weights for override in self.overrides if override.covers(weight))
        return next(covering, self.format_of(weight.role))

    def activation_of(self, role: Role) -> str:
        default = self.activations if role in ACTIVATED_BY_DEFAULT else formats.AS_IT_CAME
        return self.activation_roles.get(role, default)

    def idle(self) -> set[str]:
        rounded = {self.activations, *self.activation_roles.values()} - {formats.AS_IT_CAME}
        is_static, gptq = any(name.startswith("static") for name in rounded), self.method == "gptq"
        idle = set() if rounded else {"activations", "activation_roles", "rotate"}
        idle |= set() if gptq else {"damping", "act_order"}
        idle |= set() if gptq or is_static else {"min_tokens"}
        idle |= set() if is_static else {"activation_range"}
        return idle | (set() if is_static and self.activation_range == "percentile" else {"percentile"})


def fitted(options: Options, model) -> tuple[Options, tuple[str, ...]]:
    """What `lm_head` means where embeddings are tied; without what the model does not have."""
    from compress.passes import _fitting

    return _fitting.fit(options, model)


def requires(options: Options, model) -> None:
    """Refuses what a recipe names and would do nothing to."""
    weights = list(model.weights)
    present = {weight.role for weight in weights}
    _refuse_idle_activations(options, weights, present)
    for number, override in enumerate(options.overrides):
        for part in override.parts():
            if not any(part.covers(weight) for weight in weights):
                raise InputError(
                    f"quantize.overrides.{number} covers no matrix of this model: {part.model_dump_json()}"
                )


def _refuse_idle_activations(options: Options, weights, present: set[Role]) -> None:
    """Inputs that are named but would not be rounded, or rotated for nothing."""
    asked = [role for role, name in options.activation_roles.items() if name != formats.AS_IT_CAME]
    if Role.EMBEDDING in asked and Role.LM_HEAD in present:
        raise InputError(
            "quantize.activation_roles names 'embedding', which has no input: the output matrix is not tied to it"
        )
    quantized = {weight.role for weight in weights if options.format_for(weight) in formats.FILES}
    rounded = [role for role in quantized if options.activation_of(role) != formats.AS_IT_CAME]
    idle = options.activations != formats.AS_IT_CAME and not rounded
    if idle or (options.method == "gptq" and not quantized):
        raise InputError(
            "quantize would do nothing: no weights are quantized, or none of those whose inputs are to be rounded"
        )
    for role in asked:
        if role not in quantized:
            raise InputError(
                f"quantize.activation_roles names {_as_named(role, present)}, but its weights are not quantized: inputs are "
                "rounded with them only"
            )
    for role in options.rotate:
        if role not in quantized or options.activation_of(role) == formats.AS_IT_CAME:
            raise InputError(
                f"quantize.rotate names {_as_named(role, present)}, whose inputs are not rounded; "
                f"add activation_roles: {{{role}: static-int8}}"
            )


def _as_named(role: Role, present: set[Role]) -> str:
    """A role as the recipe may have called it."""
    tied = role == Role.EMBEDDING and Role.LM_HEAD not in present
    return f"'{role}'{' (lm_head, which is tied to it)' if tied else ''}"


def needs_calibration(options: Options) -> bool:
    asked = (options.activations, *options.activation_roles.values())
    return options.method == "gptq" or options.equalize is not None or any(name.startswith("static") for name in asked)


def apply(options: Options, unit, context):
    """The unit with every weight its role's format applies to quantized on load, by rounding to nearest."""
    from compress.passes.quantization import rounding

    return unit.map(lambda weight: rounding.lazily(weight, options, context.device))


def calibrate(options: Options, unit, inputs, context):
    """The unit quantized with regard to what reaches its matrices, and a note on what that was."""
    from compress.passes.quantization import calibrated

    return calibrated.quantize(options, unit, inputs, context.device)


def details(options: Options, units, notes: list[dict]) -> dict:
    """What the report says: what each format holds, what stands in for a format that does not fit, which experts
    saw too few tokens."""
    weights = [weight for unit in units for weight in unit.weights.values()]
    found = {"method": options.method, "formats": _by(weights, lambda weight: weight.format)}
    if activated := [weight for weight in weights if weight.activation]:
        found["activations"] = _by(activated, lambda weight: weight.activation.format)
    if rotated := sum(weight.rotation is not None for weight in weights):
        found["rotated"] = rotated
    if options.method == "gptq" and any(weight.role == Role.LM_HEAD for weight in weights):
        # an embedding that no output matrix is tied to is looked up: it has no inputs to compensate for
        found["rounded_to_nearest"] = [w.name for w in weights if w.is_quantized and w.role == Role.EMBEDDING]
    if replaced := _replaced(options, weights):
        found["stored_otherwise"] = replaced
    return found | _joined(notes)


def _by(weights, key) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for weight in weights:
        entry = counts.setdefault(key(weight), {"tensors": 0, "parameters": 0})
        entry["tensors"] += 1
        entry["parameters"] += weight.parameters
    return counts


def _replaced(options: Options, weights) -> list[dict]:
    """Formats whose groups do not divide K, by role: what was asked for, what is stored, in how many tensors."""
    counts: dict[tuple, int] = {}
    for weight in weights:
        asked = options.format_for(weight)
        if weight.is_quantized and asked not in (weight.format, formats.AS_IT_CAME):
            key = (str(weight.role), asked, weight.format, weight.shape[1])
            counts[key] = counts.get(key, 0) + 1
    return [
        {"role": role, "asked": asked, "stored": stored, "inputs": inputs, "tensors": count}
        for (role, asked, stored, inputs), count in counts.items()
    ]


def _joined(notes: list[dict]) -> dict:
    """Lists of the layers' notes one after another."""
    joined: dict[str, list] = {}
    for note in notes:
        for key, values in note.items():
            joined.setdefault(key, []).extend(values)
    return joined
