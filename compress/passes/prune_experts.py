"""`prune_experts`: removes, or merges, the experts of MoE layers that the model can best spare.

docs/expert-pruning.md argues the defaults with figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from compress.errors import InputError, WorkError
from compress.model import expert_counts
from compress.model.records import Change
from compress.model.roles import Role
from compress.passes import Coverage, Details, Fact, Found, Note, Pass, PassContext
from compress.passes.pruning import report
from compress.passes.pruning.report import LayerNote, PruneDetails
from compress.strict.models import Number, Strict, WholeNumber

if TYPE_CHECKING:  # a recipe is validated without torch
    from compress.calibration.inputs import LayerInputs, UnitInputs
    from compress.model import routing
    from compress.model.config import Config
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Spec, Stored, Unit, UnitSpec, Weight

AMOUNTS = ("keep", "fraction", "budget")
KEEP_ROWS = "keep_rows"
FEW_TOKENS = 256  # calibration tokens of an expert below which its figures are rough


Router = Literal["slice", "rescale", "keep_rows"]  # what is done about the rows of removed experts


class Options(Strict):
    method: Literal["frequency", "mean_gate", "ean", "reap", "reconstruction", "merge"] = "reconstruction"
    keep: WholeNumber | None = Field(default=None, ge=1)  # experts of every MoE layer
    fraction: Number | None = Field(default=None, gt=0, lt=1)  # of every MoE layer's experts, removed
    budget: Number | None = Field(default=None, gt=0, lt=1)  # of all experts, removed where it costs least
    router: Router = "rescale"
    recovery: Literal["none", "least_squares"] = "least_squares"
    damping: Number = Field(default=1.0, gt=0, le=1000)  # of least squares, of the mean of the moments' diagonal
    merge_weights: Literal["frequency", "mean_gate"] = "frequency"

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            more = f", not {' and '.join(given)}; null switches one off" if given else ""
            raise ValueError(f"expected exactly one of {', '.join(AMOUNTS)}{more}")
        return self

    def idle(self) -> set[str]:
        uncorrected = set() if self.recovery == "least_squares" else {"damping"}
        return uncorrected | (set() if self.method == "merge" else {"merge_weights"})


class Shares(Strict):
    """What the survey of a budget found: the experts that every MoE layer keeps."""

    kept: dict[int, int]


class PruneExperts(Pass[Options]):
    spoken_for = frozenset(PruneDetails.model_fields)
    scratch_states = 3  # what the experts gave, what they give, and what they would give with one more correction

    def fitted(self, model: HybridModel) -> tuple[Self, tuple[str, ...]]:
        """What the default of `router` comes to where nothing grows."""
        routers = [layer.experts.router for layer in model.layers if layer.experts]
        if self.options.router != "rescale" or not routers or any(router.inflates for router in routers):
            return self, ()
        renormalized = all(router.renormalized for router in routers)
        why = "sum to the same whatever experts there are" if renormalized else "do not depend on other experts"
        return self, (
            f"a token's gates {why}, so none grows when experts are removed: router rescale is one factor a layer, of what "
            "the experts that stay give to what all gave",
        )

    def requires(self, model: HybridModel) -> None:
        """Refuses amounts this model cannot spare, and models that have no experts or whose experts are quantized."""
        counts = expert_counts.refuse_unprunable(model, "prune_experts")
        _refuse_router(self.options, [layer.experts.router for layer in model.layers if layer.experts])
        experts = [weight for weight in model.weights if weight.role == Role.EXPERTS]
        formats = {weight.format for weight in experts}
        if any(weight.is_quantized for weight in experts):
            raise InputError(
                "prune_experts must come before the quantize that stores the experts: corrections are made to them as they came"
            )
        if len(formats) > 1:
            raise InputError(f"prune_experts: the experts are stored in several types: {', '.join(sorted(formats))}")
        _refuse_amount(self.options, model.config, len(counts))

    def apply(self, unit: Unit, context: PassContext) -> Unit:
        """Units without experts stay as they are."""
        return unit

    def restructure(self, model: HybridModel, context: PassContext) -> HybridModel:
        """The model with fewer experts; which of them stay is not known before calibration."""
        architecture = model.architecture
        rows = model.config.total_experts if self.options.router == KEEP_ROWS else None
        kept = _kept(self.options, model, context.found)
        values = expert_counts.pruned(
            model.config_json, architecture.EXPERTS_KEYS, kept, model.config.num_hidden_layers, rows
        )
        pruned = type(architecture).parse(values, "config.json after prune_experts")
        sources = {unit.name: unit for unit in model.units}
        units = tuple(_planned_unit(sources[unit.name], unit) for unit in pruned.layout())
        return replace(model, architecture=pruned, units=units, config_json=values)

    @property
    def needs_survey(self) -> bool:
        return self.options.budget is not None

    def survey(self, layers: Iterator[tuple[Unit, LayerInputs]], context: PassContext) -> Found:
        """How many experts every MoE layer keeps under the budget."""
        from compress.passes.pruning import allocation
        from compress.passes.pruning.reconstruction import Reconstruction
        from compress.passes.pruning.statistics import collect

        curves, experts = {}, 0
        for unit, inputs in layers:
            if inputs.layer.experts:
                experts = inputs.experts.count
                least = expert_counts.fewest(inputs.experts.router.top_k)
                curve = Reconstruction(collect(unit, inputs), self.options.router).curve(least)
                curves[inputs.index] = {kept: loss for kept, (_, loss) in curve.items()}
        kept = allocation.allocate(curves, experts, _removed(self.options, experts, len(curves)))
        return Shares(kept=kept).model_dump(mode="json")

    @property
    def needs_calibration(self) -> bool:
        return True

    def calibrate(self, unit: Unit, inputs: UnitInputs, context: PassContext) -> tuple[Unit, Note]:
        """The unit with the experts that stay, corrected, and what the report says of it."""
        from compress.calibration.inputs import LayerInputs
        from compress.passes.pruning import prune as layer

        if not isinstance(inputs, LayerInputs) or all(w.role != Role.EXPERTS for w in unit.weights.values()):
            return unit, {}
        if context.found is not None:
            count = Shares.model_validate(context.found).kept[inputs.index]
        else:
            count = inputs.experts.count - _removed(self.options, inputs.experts.count, 1)
        return layer.prune(self.options, unit, inputs, count)

    def changes(self, before: HybridModel, after: HybridModel, found: Found | None) -> tuple[Fact, ...]:
        """How many experts stay; before a survey only the sum is known."""
        if self.needs_survey and found is None:
            left, whole = (sum(expert_counts.of_model(model).values()) for model in (after, before))
            return (
                Fact("experts", f"{left} of {whole} experts stay, shared among layers by a survey of their losses."),
            )
        return tuple(Fact("experts", sentence) for sentence in expert_counts.changes(before, after))

    def records(self, before: HybridModel, after: HybridModel, notes: Sequence[Note]) -> Sequence[Change]:
        """Which experts are left, and what their matrices were multiplied with."""
        from compress.passes.pruning import recording

        return [change for layer in _layers(notes) for change in recording.of_layer(layer, after, self.options.router)]

    def details(self, units: Sequence[Unit], notes: Sequence[Note]) -> Details:
        options, layers = self.options, _layers(notes)
        found = report.details(options.method, options.router, options.recovery, layers, FEW_TOKENS)
        return found.model_dump(exclude_unset=True)

    def sentences(self, details: Details) -> list[str]:
        return report.sentences(PruneDetails.model_validate(details))

    def coverage(self, details: Details) -> Coverage | None:
        return report.coverage(PruneDetails.model_validate(details), FEW_TOKENS)


def _layers(notes: Sequence[Note]) -> list[LayerNote]:
    """Of the layers that have experts."""
    return [LayerNote.model_validate(note) for note in notes if note]


def _refuse_router(options: Options, routers: list[routing.Router]) -> None:
    """Those of a model in which removal would break the choice of experts, or kept rows mean nothing."""
    if options.router == KEEP_ROWS and not all(router.inflates for router in routers):
        raise InputError(
            "prune_experts.router is keep_rows, but the gates of this model do not depend on the experts that are not "
            "chosen: rows of removed experts would change nothing"
        )
    if any(router.groups > 1 for router in routers):
        raise InputError(
            "prune_experts: experts are chosen from groups of equal size in this model, which removal breaks"
        )


def _refuse_amount(options: Options, config: Config, layers: int) -> None:
    experts, top_k = config.total_experts, config.num_experts_per_tok
    least = expert_counts.fewest(top_k)
    if options.keep is not None and options.keep > experts:
        raise InputError(
            f"prune_experts.keep is {options.keep}, but a layer of the model has {experts} experts: "
            f"{least} to {experts - 1} may stay"
        )
    if _removed(options, experts, layers) == 0:
        given = next(name for name in AMOUNTS if getattr(options, name) is not None)
        of = experts * layers if given == "budget" else experts
        raise InputError(f"prune_experts.{given} {getattr(options, given)} removes none of {of} experts")
    fewest = experts - -(-_removed(options, experts, layers) // layers)
    if fewest < least:
        why = f"every token goes to {top_k}" if top_k > 1 else "a layer with one is a dense feed-forward"
        raise InputError(
            f"prune_experts would keep {fewest} of {experts} experts in a layer, but {why}: {least} must stay"
        )


def _removed(options: Options, experts: int, layers: int) -> int:
    """Experts removed in all."""
    if options.keep is not None:
        return (experts - options.keep) * layers
    if options.fraction is not None:
        return _floor(options.fraction, experts) * layers
    return _floor(options.budget or 0, experts * layers)


def _floor(share: float, count: int) -> int:
    """floor(share x count) of the number as it was written: 0.29 x 100 is 29."""
    return math.floor(Decimal(str(share)) * count)


def _kept(options: Options, model: HybridModel, found: Found | None) -> dict[int, int]:
    """How many experts every MoE layer keeps. Before a survey has shared a budget, as evenly as it goes: the size is the
    same."""
    if found is not None:
        return Shares.model_validate(found).kept
    counts = expert_counts.of_model(model)
    removed = _removed(options, model.config.total_experts, len(counts))
    each, more = divmod(removed, len(counts))
    return {layer: count - each - (number < more) for number, (layer, count) in enumerate(counts.items())}


def _planned_unit(source: Unit, planned: UnitSpec) -> Unit:
    """Experts and router that do not load; everything else as it is."""

    def load(rows: slice | None = None) -> Stored:
        raise WorkError(f"{planned.name}: which experts stay is decided by calibration")

    def weight(spec: Spec) -> Weight:
        came = source.weights[spec.name]
        changes = spec.role in (Role.EXPERTS, Role.ROUTER)
        return replace(came, shape=spec.shape, load=load) if changes else came

    travelling = {name: came for name, came in source.weights.items() if came.role == Role.MTP}
    return replace(source, weights={spec.name: weight(spec) for spec in planned.specs} | travelling)
