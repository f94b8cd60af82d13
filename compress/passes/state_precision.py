"""`state_precision`: how what a model remembers is kept between calls, by kind of state and by layer.

It changes no weight: config.json says how each state is kept, and whatever runs the model rounds. Static scales are added, as
a tensor of the layer. docs/state-precision.md argues the choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, field_validator, model_validator

from compress.formats.state_words import (
    MOST_EVERY,
    WITHOUT_SCALES,
    Axis,
    Format,
    Kind,
    Residual,
    Rounding,
    Scale,
    residual_of,
    why_unfit,
)
from compress.model.records import Change, Recomputed
from compress.model.tensor_names import in_short
from compress.passes import Details, Fact, Found, Note, Pass, PassContext
from compress.strict.json_text import Json
from compress.strict.models import Strict, WholeNumber

if TYPE_CHECKING:  # a recipe is validated without torch
    from compress.calibration.inputs import UnitInputs
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit

EVERY = "every"  # layer
KINDS: tuple[Kind, ...] = ("ssm_state", "conv_state", "kv_cache")


class StateFormat(Strict):
    """How a kind of state is kept; in a recipe the bare name of a format is one with all defaults."""

    format: Format
    rounding: Rounding = "nearest"
    residual: Residual | None = None  # of what rounding loses, with error_feedback; int8 by default
    every: WholeNumber = Field(default=1, ge=1, le=MOST_EVERY)  # tokens between two roundings
    scale: Scale = "dynamic"
    axis: Axis | None = None  # along which entries of a recurrent state share a scale; d_state by default
    block: WholeNumber | None = Field(default=None, ge=1)  # entries that share a scale
    seed: WholeNumber | None = Field(default=None, ge=0)  # in place of the run's

    @model_validator(mode="before")
    @classmethod
    def _of_a_name(cls, given: Json) -> Json:
        return {"format": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if why := why_unfit(self):
            raise ValueError(why)
        return self


class Override(StateFormat):
    """Another format for a kind of state in some layers."""

    kind: Kind
    layers: tuple[WholeNumber, ...] | None = Field(default=None, min_length=1)  # None: in every layer

    @field_validator("layers", mode="before")
    @classmethod
    def _every(cls, given: Json) -> Json:
        if isinstance(given, str) and given != EVERY:
            raise ValueError(f"expected a list of layers, such as [0, 2], or {EVERY}, not '{given:.80}'")
        return None if given == EVERY else given

    def covers(self, kind: str, layer: int) -> bool:
        return self.kind == kind and (self.layers is None or layer in self.layers)


class Options(Strict):
    """What is not named stays as it is."""

    ssm_state: StateFormat | None = None
    conv_state: StateFormat | None = None
    kv_cache: StateFormat | None = None
    overrides: tuple[Override, ...] = ()  # the first that covers a state wins over its kind

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.overrides and not self.by_kind():
            raise ValueError(f"names no state; expected one of {', '.join(KINDS)}, or overrides")
        return self

    def by_kind(self) -> dict[Kind, StateFormat]:
        given = {kind: getattr(self, kind) for kind in KINDS}
        return {kind: wanted for kind, wanted in given.items() if wanted is not None}

    def wanted(self) -> Iterator[StateFormat]:
        yield from (*self.by_kind().values(), *self.overrides)

    def of(self, kind: str, layer: int) -> StateFormat | None:
        """How a state is to be kept; None where it stays as it is."""
        covering = (override for override in self.overrides if override.covers(kind, layer))
        return next(covering, getattr(self, kind))


class StatePrecision(Pass[Options]):
    spoken_for = frozenset({*KINDS, "overrides", "static"})
    follows_surveys = True  # states are the same whatever experts stay

    def fitted(self, model: HybridModel) -> tuple[StatePrecision, tuple[str, ...]]:
        """Without the kinds of state that this model does not have."""
        present = {spec.kind for layer in model.layers for spec in layer.states}
        absent = [kind for kind in self.options.by_kind() if kind not in present]
        said = tuple(f"'{kind}' is named, but this model keeps no such state" for kind in absent)
        return StatePrecision(self.options.model_copy(update=dict.fromkeys(absent))), said

    def requires(self, model: HybridModel) -> None:
        from compress.passes.states import deciding

        deciding.refuse_unfit(self.options, model)

    def apply(self, unit: Unit, context: PassContext) -> Unit:
        """Nothing changes but by calibration."""
        return unit

    def restructure(self, model: HybridModel, context: PassContext) -> HybridModel:
        """The model whose config.json says how states are kept, with the static scales that calibration will find."""
        from compress.passes.states import deciding

        return deciding.restated(self.options, model, context.seed)

    @property
    def needs_calibration(self) -> bool:
        return any(wanted.scale == "static" for wanted in self.options.wanted())

    def calibrate(self, unit: Unit, inputs: UnitInputs, context: PassContext) -> tuple[Unit, Note]:
        """The layer with the static scales of its states."""
        from compress.calibration.inputs import LayerInputs
        from compress.passes.states import scales

        return scales.found(self.options, unit, inputs) if isinstance(inputs, LayerInputs) else (unit, {})

    def changes(self, before: HybridModel, after: HybridModel, found: Found | None) -> tuple[Fact, ...]:
        from compress.passes.states import deciding

        return tuple(Fact("states", sentence) for sentence in deciding.changes(before, after))

    def records(self, before: HybridModel, after: HybridModel, notes: Sequence[Note]) -> Sequence[Change]:
        """Static scales: the states themselves stand in `compress.states`."""
        came = {weight.name for weight in before.weights}
        new = [weight.name for weight in after.weights if weight.name not in came]
        return [Recomputed(tensors=in_short(new), by="states_on_calibration_tokens")] if new else []

    def details(self, units: Sequence[Unit], notes: Sequence[Note]) -> Details:
        """The options in force, and of static scales the range of what they were found from."""
        ranges = [entry for note in notes for entry in _entries(note)]
        return {**self.options.in_force(), **({"static": ranges} if ranges else {})}

    def sentences(self, details: Details) -> list[str]:
        kinds = "; ".join(f"{kind}: {_words(wanted)}" for kind, wanted in self.options.by_kind().items())
        others = [f"{override.kind} of {_layers(override)}: {_words(override)}" for override in self.options.overrides]
        ranges = details.get("static")
        count = len(ranges) if isinstance(ranges, list) else 0
        said = [f"Static scales of {count} states, from the calibration tokens."] if count else []
        return [f"{kinds}." if kinds else "", *(f"{other}." for other in others), *said]


def _entries(note: Note) -> list[Json]:
    entries = note.get("static")
    return entries if isinstance(entries, list) else []


def _words(wanted: StateFormat) -> str:
    residual = residual_of(wanted)
    parts: Mapping[str, bool] = {
        wanted.rounding if residual is None else f"error feedback in {residual}": wanted.format != "fp32",
        f"every {wanted.every} tokens": wanted.every > 1,
        f"{wanted.scale} scales": wanted.format not in WITHOUT_SCALES,
        "along d_inner": wanted.axis == "d_inner",
        f"in blocks of {wanted.block}": wanted.block is not None,
    }
    return ", ".join([wanted.format, *(word for word, counts in parts.items() if counts)])


def _layers(override: Override) -> str:
    if override.layers is None:
        return "every layer"
    return f"layer{'s' if len(override.layers) > 1 else ''} {', '.join(map(str, override.layers))}"
