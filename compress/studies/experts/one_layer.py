"""What one layer's experts do on the tokens, and what the layer would lose without some of them."""

import math
from typing import get_args

from compress.calibration.inputs import LayerInputs
from compress.model import expert_counts
from compress.model.weight import Unit
from compress.passes.prune_experts import Options, Router
from compress.passes.pruning import scores
from compress.passes.pruning.reconstruction import Kept, Reconstruction
from compress.passes.pruning.statistics import Statistics, collect
from compress.studies.experts.findings import Layer, Loss, Predicted

ROUTERS = get_args(Router)  # ways to treat the router that `prune_experts` knows
DEFAULT_ROUTER = Options.model_fields["router"].default  # the one it takes unasked: sets of experts are chosen for it


def survey_layer(unit: Unit, inputs: LayerInputs) -> Layer:
    """The entry of one MoE layer."""
    statistics = collect(unit, inputs)
    tokens = statistics.tokens
    return {
        "layer": inputs.index,
        "experts": statistics.experts,
        "top_k": statistics.top_k,
        "tokens": tokens,
        "share": [count / len(statistics.logits) for count in tokens],
        "dead": [expert for expert, count in enumerate(tokens) if count == 0],
        "scores": {name: scores.of(name, statistics).tolist() for name in scores.NAMES},
        "similarity": statistics.similarity().tolist(),
        "predicted": _predicted(statistics),
    }


def _predicted(statistics: Statistics) -> list[Predicted]:
    """For every number of experts that can stay: which ones, and what the layer loses with each way to treat the router.
    Of groups of equal size all stay."""
    if statistics.router.groups > 1:
        return []
    least = expert_counts.fewest(statistics.top_k)
    curve = Reconstruction(statistics, DEFAULT_ROUTER).curve(least)
    sets = {count: kept for count, (kept, _) in curve.items()}
    losses = {router: _losses(statistics, router, sets) for router in ROUTERS}
    return [
        {"kept": count, "experts": list(kept), "loss": {router: losses[router][count] for router in ROUTERS}}
        for count, kept in sets.items()
    ]


def _losses(statistics: Statistics, router: str, sets: dict[int, Kept]) -> dict[int, float]:
    """One way at a time: each holds a copy of all inner products. Rounding may leave a square just below zero."""
    reconstruction = Reconstruction(statistics, router)
    return {count: max(0.0, reconstruction.loss(kept)) for count, kept in sets.items()}


def total(layers: list[Layer]) -> list[Loss]:
    """Losses summed over layers, for every number of experts kept in each."""
    return [
        {
            "kept": together[0]["kept"],
            "loss": {router: math.fsum(one["loss"][router] for one in together) for router in ROUTERS},
        }
        for together in zip(*(entry["predicted"] for entry in layers), strict=True)
    ]
