"""`quantize`: stores weights, and where asked rounds activations, in the number format the recipe gives their role.

Roles that must not lose precision (`roles.KEPT_BY_DEFAULT`; docs/roles.md says why) stay as they came.
docs/quantization.md argues the defaults with figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from compress import formats
from compress.errors import InputError
from compress.model.names import layer_of
from compress.model.records import Change, Rotated, Rounded
from compress.model.roles import ACTIVATED_BY_DEFAULT, KEPT_BY_DEFAULT, QUANTIZABLE, Role
from compress.model.tensor_names import in_short, written_out
from compress.passes import Coverage, Details, Note, Pass, PassContext
from compress.passes.quantization import report
from compress.passes.quantization.report import QuantizeDetails, UnitNote
from compress.strict.json_text import Json
from compress.strict.models import KeyedError, Number, Strict, WholeNumber

if TYPE_CHECKING:  # a recipe is validated without torch
    from compress.calibration.inputs import UnitInputs
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit, Weight

    WeightFormat = str
else:
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

    def parts(self) -> Iterator[Override]:
        """One for every layer and projection that is named."""
        layers: list[tuple[int, ...]] = [(layer,) for layer in self.layers]
        projections: list[tuple[str, ...]] = [(projection,) for projection in self.projections]
        for some, others in product(layers or [()], projections or [()]):
            yield self.model_copy(update={"layers": some, "projections": others})

    def covers(self, weight: Weight) -> bool:
        """`projections` are the matrix's own name, such as `down_proj`: all experts of a layer are stored alike."""
        projection: str = weight.name.removesuffix(".weight").rpartition(".")[2]
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
    def _clip_by_method(cls, given: Json) -> Json:
        """The default is written out: a resolved recipe says all that decides the weights."""
        if isinstance(given, dict) and given.get("method") == "gptq":
            return {"clip": "mse", **given}
        return given

    @field_validator("roles", "activation_roles")
    @classmethod
    def _only_matrices(cls, roles: dict[Role, str]) -> dict[Role, str]:
        for role, format_name in roles.items():
            if role in KEPT_BY_DEFAULT and format_name != formats.AS_IT_CAME:
                raise KeyedError(role, _always_kept(role))
        return roles

    def format_of(self, role: Role) -> str:
        default = formats.AS_IT_CAME if role in KEPT_BY_DEFAULT else self.weights
        return self.roles.get(role, default)

    def format_for(self, weight: Weight) -> str:
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


class Quantize(Pass[Options]):
    spoken_for = frozenset(QuantizeDetails.model_fields)

    def fitted(self, model: HybridModel) -> tuple[Quantize, tuple[str, ...]]:
        """What `lm_head` means where embeddings are tied; without what the model does not have."""
        from compress.passes import _fitting

        options, sentences = _fitting.fit(self.options, model)
        return Quantize(options), sentences

    def requires(self, model: HybridModel) -> None:
        """Refuses what a recipe names and would do nothing to."""
        weights = list(model.weights)
        present = {weight.role for weight in weights}
        _refuse_idle_activations(self.options, weights, present)
        for number, override in enumerate(self.options.overrides):
            for part in override.parts():
                if not any(part.covers(weight) for weight in weights):
                    raise InputError(
                        f"quantize.overrides.{number} covers no matrix of this model: {part.model_dump_json()}"
                    )

    def apply(self, unit: Unit, context: PassContext) -> Unit:
        """The unit with every weight its role's format applies to quantized on load, by rounding to nearest."""
        from compress.passes.quantization import rounding

        return unit.map(lambda weight: rounding.lazily(weight, self.options, context.device))

    @property
    def needs_calibration(self) -> bool:
        options = self.options
        asked = (options.activations, *options.activation_roles.values())
        return (
            options.method == "gptq" or options.equalize is not None or any(name.startswith("static") for name in asked)
        )

    def calibrate(self, unit: Unit, inputs: UnitInputs, context: PassContext) -> tuple[Unit, Note]:
        """The unit quantized with regard to what reaches its matrices, and a note on what that was."""
        from compress.passes.quantization import calibrated

        return calibrated.quantize(self.options, unit, inputs, context.device)

    def records(self, before: HybridModel, after: HybridModel, notes: Sequence[Note]) -> Sequence[Change]:
        """Factors that were folded in, rotations, and how each tensor that was stored anew was rounded."""
        found = [UnitNote.model_validate(note) for note in notes]
        gptq = set(written_out(names for note in found for names in note.gptq))
        stored = [new for old, new in zip(before.weights, after.weights, strict=True) if new is not old]
        rotated = {block: [w.name for w in stored if w.rotation == block] for block in {w.rotation for w in stored}}
        compensated = [weight.name for weight in stored if weight.name in gptq]
        nearest = [weight.name for weight in stored if weight.name not in gptq]
        return (
            *(fold for note in found for fold in note.folds),
            *(Rotated(tensors=in_short(names), block=block) for block, names in rotated.items() if block),
            *((Rounded(tensors=in_short(compensated), method="gptq"),) if compensated else ()),
            *((Rounded(tensors=in_short(nearest), method="nearest"),) if nearest else ()),
        )

    def details(self, units: Sequence[Unit], notes: Sequence[Note]) -> Details:
        found = [UnitNote.model_validate(note) for note in notes]
        return report.details(self.options, units, found).model_dump(exclude_none=True)

    def sentences(self, details: Details) -> list[str]:
        return [report.sentence(QuantizeDetails.model_validate(details))]

    def coverage(self, details: Details) -> Coverage | None:
        return report.coverage(QuantizeDetails.model_validate(details))


def _refuse_idle_activations(options: Options, weights: list[Weight], present: set[Role]) -> None:
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
