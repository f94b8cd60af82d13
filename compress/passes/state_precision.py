"""`state_precision`: how what a model remembers is kept between calls, by kind of state and by layer.

It changes no weight: config.json says how each state is kept, and whatever runs the model rounds. Static scales are added, as
a tensor of the layer. docs/state-precision.md argues the choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

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
from compress.passes import Details, Fact, Finished, Found, Note, Pass, PassContext, Trial
from compress.recipe.check import DRIFT_FROM, NOT_ZERO
from compress.strict.json_text import Json
from compress.strict.models import KeyedError, Number, Strict, WholeNumber

if TYPE_CHECKING:  # a recipe is validated without torch
    from compress.calibration.inputs import UnitInputs
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit

Measured = Literal["decode_drift_ratio", "kl_divergence_mean"]
EVERY = "every"  # layer
MOST_CONTEXT = 1 << 30  # tokens
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
        if given == [] or given == ():
            raise ValueError(f"names no layer; expected a list of layers, such as [0, 2], or {EVERY}")
        return None if given == EVERY else given

    def covers(self, kind: str, layer: int) -> bool:
        return self.kind == kind and (self.layers is None or layer in self.layers)


class Auto(Strict):
    """What a search is to reach: a loss that is not exceeded, or bytes of a sequence that are not."""

    budget: Number | None = Field(default=None, ge=0)
    metric: Measured | None = None  # None: decode_drift_ratio
    bytes: WholeNumber | None = Field(default=None, ge=1)
    context: WholeNumber = Field(default=4096, ge=1, le=MOST_CONTEXT)  # tokens, at which bytes are counted

    @property
    def measured(self) -> Measured:
        """What a budget is of; the loss that is told where bytes are counted."""
        return self.metric or ("decode_drift_ratio" if self.bytes is None else "kl_divergence_mean")

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        if (self.budget is None) == (self.bytes is None):
            raise ValueError("expected one of budget (a loss) and bytes (of a sequence)")
        if self.bytes is not None and self.metric is not None:
            raise KeyedError("metric", "is what a budget is of; bytes are counted")
        if self.budget is not None and self.budget < 1 and self.measured in NOT_ZERO:
            raise KeyedError("budget", f"no {self.measured} below 1 can be asked for; 1 is an unchanged perplexity")
        return self


class Options(Strict):
    """What is not named stays as it is, or is left to the search where there is one."""

    ssm_state: StateFormat | None = None
    conv_state: StateFormat | None = None
    kv_cache: StateFormat | None = None
    overrides: tuple[Override, ...] = ()  # the first that covers a state wins over its kind
    auto: Auto | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.overrides and not self.by_kind() and self.auto is None:
            raise ValueError(f"names no state; expected one of {', '.join(KINDS)}, overrides, or auto")
        if self.auto is not None and len(self.by_kind()) == len(KINDS):
            raise KeyedError("auto", "has nothing to decide: every kind of state is named beside it")
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
    spoken_for = frozenset({*KINDS, "overrides", "static", "search"})
    follows_surveys = True  # states are the same whatever experts stay

    def fitted(self, model: HybridModel) -> tuple[StatePrecision, tuple[str, ...]]:
        """Without the kinds of state that this model does not have."""
        present = {spec.kind for layer in model.layers for spec in layer.states}
        absent = [kind for kind in self.options.by_kind() if kind not in present]
        said = tuple(f"'{kind}' is named, but this model keeps no such state" for kind in absent)
        return StatePrecision(self.options.model_copy(update=dict.fromkeys(absent))), said

    def requires(self, model: HybridModel) -> None:
        from compress.passes.states import deciding, leeway

        leeway.refuse_unreachable(self.options, model)
        deciding.refuse_unfit(leeway.begun(self.options, model), model)

    def apply(self, unit: Unit, context: PassContext) -> Unit:
        """Nothing changes but by calibration."""
        return unit

    def restructure(self, model: HybridModel, context: PassContext) -> HybridModel:
        """The model whose config.json says how states are kept, with the static scales that calibration will find; what a
        search will decide, as it begins."""
        from compress.passes.states import deciding, leeway

        return deciding.restated(leeway.begun(self.options, model), model, context.seed)

    @property
    def needs_calibration(self) -> bool:
        return any(wanted.scale == "static" for wanted in self.options.wanted())

    def calibrate(self, unit: Unit, inputs: UnitInputs, context: PassContext) -> tuple[Unit, Note]:
        """The layer with the static scales of its states."""
        from compress.calibration.inputs import LayerInputs
        from compress.passes.states import scales

        return scales.found(self.options, unit, inputs) if isinstance(inputs, LayerInputs) else (unit, {})

    @property
    def needs_settling(self) -> bool:
        return self.options.auto is not None

    @property
    def least_window(self) -> int:
        auto = self.options.auto
        return DRIFT_FROM + 1 if auto is not None and auto.measured == "decode_drift_ratio" else 2

    def settle(self, finished: Finished, context: PassContext) -> tuple[Options, Note]:
        """The formats that the search chose, beside those that are named."""
        from compress.passes.states import search

        return search.settled(self.options, finished, context.seed)

    def changes(self, before: HybridModel, after: HybridModel, found: Found | None) -> tuple[Fact, ...]:
        from compress.passes.states import deciding, leeway

        auto = self.options.auto
        told = deciding.changes(before, after) if auto is None else leeway.prospects(auto, self.options, before)
        return tuple(Fact("states", sentence) for sentence in told)

    def records(self, before: HybridModel, after: HybridModel, notes: Sequence[Note]) -> Sequence[Change]:
        """Static scales: the states themselves stand in `compress.states`."""
        came = {weight.name for weight in before.weights}
        new = [weight.name for weight in after.weights if weight.name not in came]
        return [Recomputed(tensors=in_short(new), by="states_on_calibration_tokens")] if new else []

    def details(self, units: Sequence[Unit], notes: Sequence[Note]) -> Details:
        """The options in force; of static scales the range of what they were found from; of a search what it measured."""
        ranges = [entry for note in notes for entry in _entries(note)]
        searches = [note["search"] for note in notes if "search" in note]
        told = {**self.options.in_force(), **({"static": ranges} if ranges else {})}
        return {**told, **({"search": searches[-1]} if searches else {})}

    def trials(self, details: Details) -> Sequence[Trial]:
        return _trials(details)

    def sentences(self, details: Details) -> list[str]:
        kinds = "; ".join(f"{kind}: {_words(wanted)}" for kind, wanted in self.options.by_kind().items())
        others = [f"{override.kind} of {_layers(override)}: {_words(override)}" for override in self.options.overrides]
        ranges = details.get("static")
        count = len(ranges) if isinstance(ranges, list) else 0
        said = [f"Static scales of {count} states, from the calibration tokens."] if count else []
        return [f"{kinds}." if kinds else "", *(f"{other}." for other in others), *said, *_search_lines(details)]


def _entries(note: Note) -> list[Json]:
    entries = note.get("static")
    return entries if isinstance(entries, list) else []


def _search_lines(details: Details) -> list[str]:
    """Of a search."""
    from compress.passes.states import findings

    return findings.sentences(details["search"], _words) if "search" in details else []


def _trials(details: Details) -> Sequence[Trial]:
    from compress.passes.states import findings

    return findings.trials(details["search"], _words) if "search" in details else ()


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
