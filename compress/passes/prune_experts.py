"""`prune_experts`: removes, or merges, the experts of MoE layers that the model can best spare.

docs/expert-pruning.md argues the defaults with figures.
"""

import math
from dataclasses import replace
from decimal import Decimal
from typing import Literal

from pydantic import Field, model_validator

from compress.errors import InputError, WorkError
from compress.model import expert_counts
from compress.model.roles import Role
from compress.strict.models import Number, Strict, WholeNumber

AMOUNTS = ("keep", "fraction", "budget")
FEW_TOKENS = 256  # calibration tokens of an expert below which its figures are rough
SCRATCH_STATES = 3  # what the experts gave, what they give, and what they would give with one more correction


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
    def _one_amount(self):
        given = [name for name in AMOUNTS if getattr(self, name) is not None]
        if len(given) != 1:
            more = f", not {' and '.join(given)}; null switches one off" if given else ""
            raise ValueError(f"expected exactly one of {', '.join(AMOUNTS)}{more}")
        return self

    def idle(self) -> set[str]:
        uncorrected = set() if self.recovery == "least_squares" else {"damping"}
        return uncorrected | (set() if self.method == "merge" else {"merge_weights"})


def fitted(options: Options, model) -> tuple[Options, tuple[str, ...]]:
    """What the default of `router` comes to where nothing grows."""
    routers = [layer.experts.router for layer in model.layers if layer.experts]
    if options.router != "rescale" or not routers or any(router.inflates for router in routers):
        return options, ()
    renormalized = all(router.renormalized for router in routers)
    why = "sum to the same whatever experts there are" if renormalized else "do not depend on other experts"
    return options, (
        f"a token's gates {why}, so none grows when experts are removed: router rescale is one factor a layer, of what the "
        "experts that stay give to what all gave",
    )


def requires(options: Options, model) -> None:
    """Refuses amounts this model cannot spare, and models that have no experts or whose experts are quantized."""
    counts = expert_counts.refuse_unprunable(model, "prune_experts")
    routers = [layer.experts.router for layer in model.layers if layer.experts]
    if options.router == "keep_rows" and not all(router.inflates for router in routers):
        raise InputError(
            "prune_experts.router is keep_rows, but the gates of this model do not depend on the experts that are not "
            "chosen: rows of removed experts would change nothing"
        )
    if any(router.groups > 1 for router in routers):
        raise InputError(
            "prune_experts: experts are chosen from groups of equal size in this model, which removal breaks"
        )
    experts = [weight for weight in model.weights if weight.role == Role.EXPERTS]
    formats = {weight.format for weight in experts}
    if any(weight.is_quantized for weight in experts):
        raise InputError(
            "prune_experts must come before the quantize that stores the experts: corrections are made to them as they came"
        )
    if len(formats) > 1:
        raise InputError(f"prune_experts: the experts are stored in several types: {', '.join(sorted(formats))}")
    _refuse_amount(options, model.config, len(counts))


def _refuse_amount(options: Options, config, layers: int) -> None:
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
    return _floor(options.budget, experts * layers)


def _floor(share: float, count: int) -> int:
    """floor(share x count) of the number as it was written: 0.29 x 100 is 29."""
    return math.floor(Decimal(str(share)) * count)


def _kept(options: Options, model, found: dict | None) -> dict[int, int]:
    """How many experts every MoE layer keeps. Before a survey has shared a budget, as evenly as it goes: the size is the
    same."""
    if found is not None:
        return {int(layer): count for layer, count in found["kept"].items()}
    counts = expert_counts.of_model(model)
    removed = _removed(options, model.config.total_experts, len(counts))
    each, more = divmod(removed, len(counts))
    return {layer: count - each - (place < more) for place, (layer, count) in enumerate(counts.items())}


def restructure(options: Options, model, found: dict | None):
    """The model with fewer experts; which of them stay is not known before calibration."""
    architecture = model.architecture
    rows = model.config.total_experts if options.router == "keep_rows" else None
    kept = _kept(options, model, found)
    values = expert_counts.pruned(
        model.config_json, architecture.EXPERTS_KEYS, kept, model.config.num_hidden_layers, rows
    )
    pruned = type(architecture).parse(values, "config.json after prune_experts")
    sources = {unit.name: unit for unit in model.units}
    units = tuple(_planned_unit(sources[unit.name], unit) for unit in pruned.layout())
    return replace(model, architecture=pruned, units=units, config_json=values)


def _planned_unit(source, planned):
    """Experts and router that do not load; everything else as it is."""

    def load(rows=None):
        raise WorkError(f"{planned.name}: which experts stay is decided by calibration")

    def weight(spec):
        came = source.weights[spec.name]
        changes = spec.role in (Role.EXPERTS, Role.ROUTER)
        return replace(came, shape=spec.shape, load=load) if changes else came

    travelling = {name: came for name, came in source.weights.items() if came.role == Role.MTP}
    return replace(source, weights={spec.name: weight(spec) for spec in planned.specs} | travelling)


def needs_calibration(options: Options) -> bool:
    return True


def needs_survey(options: Options) -> bool:
    return options.budget is not None


def survey(options: Options, layers, context) -> dict:
    """How many experts every MoE layer keeps under the budget."""
    from compress.passes.pruning import allocation
    from compress.passes.pruning.reconstruction import Reconstruction
    from compress.passes.pruning.statistics import collect

    curves, experts = {}, 0
    for unit, inputs in layers:
        if inputs.layer.experts:
            experts = inputs.experts.count
            least = expert_counts.fewest(inputs.experts.router.top_k)
            curve = Reconstruction(collect(unit, inputs), options.router).curve(least)
            curves[inputs.index] = {kept: loss for kept, (_, loss) in curve.items()}
    kept = allocation.allocate(curves, experts, _removed(options, experts, len(curves)))
    return {"kept": {str(layer): count for layer, count in kept.items()}}


def apply(options: Options, unit, context):
    """Units without experts stay as they are."""
    return unit


def calibrate(options: Options, unit, inputs, context):
    """The unit with the experts that stay, corrected, and what the report says of it."""
    from compress.passes.pruning import prune as layer

    if not any(weight.role == Role.EXPERTS for weight in unit.weights.values()):
        return unit, {}
    if needs_survey(options):
        count = context.found["kept"][str(inputs.index)]
    else:
        count = inputs.experts.count - _removed(options, inputs.experts.count, 1)
    return layer.prune(options, unit, inputs, count)


def details(options: Options, units, notes: list[dict]) -> dict:
    """What the report says: layer by layer which experts stay, what every expert saw, and what the layer lost."""
    layers = [entry for note in notes for entry in note.get("layers", [])]
    experts = [
        {"layer": entry["layer"], "expert": expert, "tokens": tokens}
        for entry in layers
        for expert, tokens in enumerate(entry["tokens"])
    ]
    return {
        "method": options.method,
        "router": options.router,
        "recovery": options.recovery,
        "experts_before": sum(entry["experts"] for entry in layers),
        "experts_after": sum(len(entry["kept"]) for entry in layers),
        "layers": layers,
        "experts": experts,
        "experts_judged_on_few": [entry for entry in experts if entry["tokens"] < FEW_TOKENS],
    }
