"""What formats cost the reference model of a family: mean KL from the original in nats, `python benchmarks/default_limits.py`.

Matrices are rounded to nearest, a role at a time, in three formats; other formats cost a factor of one of these, GPTQ a factor of
rounding to nearest. Inputs are rounded a role at a time, matrices as they came. States are all of a kind, decoded.
benchmarks/RESULTS.md says on what text and which machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from compress.model.roles import Role

CASTS = {"bf16": 0.03, "fp16": 0.0005}  # of int8: the square of what they round, relatively, over that of int8
BASES = ("int8", "int4-g32", "fp8-e4m3")


@dataclass(frozen=True)
class Costs:
    """Of a family, by role and format. A role that was not there when it was measured costs as the costliest."""

    weights: Mapping[Role, Mapping[str, float]]  # in `BASES`, each role alone
    together: Mapping[str, float]  # what all roles at once cost, of the sum: tokens that change experts are counted once
    formats: Mapping[str, tuple[str, float]]  # any format: the base, and how many times its cost
    compensated: Mapping[str, float]  # GPTQ's part of it, by base
    inputs: Mapping[Role, Mapping[str, float]]
    states: Mapping[tuple[str, str, str], float]  # by kind, format and rounding
    scales: Mapping[tuple[str, str], float]  # how many times that where scales are static, or along d_inner
    removed: Mapping[float, float]  # by the share of experts that were removed, what stays corrected
    uncorrected: float  # how many times that where it is not
    tail: float  # the 99th percentile over the mean, at most

    def weights_of(self, role: Role, base: str) -> float:
        return _of_role(self.weights, role, base)

    def inputs_of(self, role: Role, rounded: str) -> float:
        return _of_role(self.inputs, role, rounded)

    def states_of(self, kind: str, number_format: str, rounding: str, scale: str) -> float:
        return self.states.get((kind, number_format, rounding), 0.0) * self.scales.get((kind, scale), 1.0)

    def at_once(self, base: str, alone: float, rounded: float) -> float:
        """What roles cost together that cost `alone` in all, each by itself; `rounded` is the same rounded to nearest in the
        base, whatever they are in: the nearer to all roles that is, the more of their tokens are the same."""
        share = min(1.0, rounded / sum(row[base] for row in self.weights.values()))
        return alone * (1 - (1 - self.together[base]) * share)

    def pruned(self, share: float, corrected: bool) -> float:
        """By the logarithm between shares that were measured, and beyond them."""
        pairs = list(pairwise(sorted(self.removed.items())))
        (low, less), (high, more) = next((pair for pair in pairs if share <= pair[1][0]), pairs[-1])
        cost = less * (more / less) ** ((share - low) / (high - low))
        return cost if corrected else cost * self.uncorrected


def _of_role(table: Mapping[Role, Mapping[str, float]], role: Role, column: str) -> float:
    found = table.get(role)
    return found[column] if found else max(of_role[column] for of_role in table.values())


def of_family(model_type: str) -> Costs:
    """Of a family that was not measured, those of the one whose matrices cost more."""
    return COSTS.get(model_type) or max(COSTS.values(), key=lambda costs: sum(row["int8"] for row in costs.weights.values()))


COSTS: dict[str, Costs] = {}
