"""Limits of a candidate by default: what its formats are expected to cost, with room for how costs differ and for chance.

Mean KL is what the others follow from. To second order in the errors of logits, a text that the original wrote itself has a
perplexity ratio of exp(KL), log-probabilities of tokens move by sqrt(2 KL), and the most likely token changes at a share of
positions that goes with sqrt(KL). docs/checks.md has how near that is on the shipped recipes, and what the limits let pass.
"""

import math

from compress.check.expected import Expected
from compress.recipe.check import MetricName

MARGIN = 1.6  # of the divergence that is expected
FLOAT_NOISE = 2e-5  # nats beyond it: routers that tip where sums are taken in another order
SHIFT, GROWTH = 0.07, 0.6  # the logarithm of a perplexity ratio is at most SHIFT sqrt(2 KL) + GROWTH KL
FLIPS = 1.25  # the share of most likely tokens that change is at most FLIPS sqrt(KL), and beyond it
FEW_FLIPS = 0.002  # what a text too short to show any cannot exclude
RESOLVED = 1e-4  # nats: below it a tail is a few tokens'
NEVER_APART = 0.003  # nats between decoding and reading at once where nothing is rounded anew


def limits(costs: Expected) -> dict[MetricName, float]:
    """Of a candidate that is expected to cost so much."""
    whole = costs.weights + costs.inputs + costs.states + costs.hidden + FLOAT_NOISE
    found: dict[MetricName, float] = {
        "perplexity_ratio": math.exp(SHIFT * math.sqrt(2 * whole) + GROWTH * whole),
        "kl_divergence_mean": MARGIN * whole,
        "top1_agreement": max(0.0, 1 - FLIPS * math.sqrt(whole) - FEW_FLIPS),
        "decode_prefill_difference": math.sqrt(2 * costs.apart) + NEVER_APART,
    }
    if costs.weights + costs.inputs >= RESOLVED and not costs.prunes:
        found["kl_divergence_tail_ratio"] = costs.tail
    return {metric: _in_short(metric, limit) for metric, limit in found.items()}


def _in_short(metric: MetricName, limit: float) -> float:
    """Three digits of what it is off from an unchanged model, as people read it."""
    unchanged = {"perplexity_ratio": 1.0, "top1_agreement": 1.0}.get(metric, 0.0)
    return round(unchanged + float(f"{limit - unchanged:.3g}"), 12)


def sentence(artifact: str, costs: Expected) -> str:
    """Where the limits come from."""
    parts = {
        "weights": costs.weights,
        "rounded inputs": costs.inputs,
        "states": costs.states,
        "hidden states": costs.hidden,
    }
    said = ", ".join(f"{what} {nats:.2g}" for what, nats in parts.items() if nats)
    return f"{artifact}: default limits, for formats that are expected to cost {said or 'nothing'} (mean KL, nats)."
