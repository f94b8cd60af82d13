"""Limits of a candidate by default: what its formats are expected to cost, with room for how costs differ and for chance.

Mean KL is what everything follows from. To second order in the errors of logits, a text that the original wrote has a perplexity
ratio of exp(KL), log-probabilities of tokens move by sqrt(2 KL), and the most likely token changes in proportion to sqrt(KL).
"""

import math

from compress.check.expected import Expected, expected
from compress.recipe.check import MetricName
from compress.runtime.artifacts import Artifact

MARGIN = 2.0
LEAST_KL = 2e-5


def of(original: Artifact, candidate: Artifact) -> dict[MetricName, float]:
    """The limits of an artifact, told from what it says of itself."""
    return limits(expected(original, candidate))


def limits(costs: Expected) -> dict[MetricName, float]:
    raise NotImplementedError
