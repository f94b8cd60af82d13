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
FUSED = "fused-int8"  # how onnxruntime rounds inputs beside packed integers
# Decoding and reading at once round the same numbers apart: log-probabilities of tokens lie so many times sqrt(2 KL) from each other
# at most, of what inputs or states cost. Measured: 0.03 to 1.07, the latter where routers tip.
APART = 1.5
HIDDEN_APART = (
    2.1  # the same where hidden states are in 16 bits: measured 1.2 to 1.3, of little text, since few routers tip
)
BASES = ("int8", "int4-g32", "fp8-e4m3")


@dataclass(frozen=True)
class Costs:
    """Of a family, by role and format. A role that was not there when it was measured costs as the costliest."""

    weights: Mapping[Role, Mapping[str, float]]  # in `BASES`, each role alone
    together: Mapping[
        str, float
    ]  # what all roles at once cost, of the sum: tokens that change experts are counted once
    formats: Mapping[str, tuple[str, float]]  # any format: the base, and how many times its cost
    compensated: Mapping[str, float]  # GPTQ's part of it, by base
    inputs: Mapping[Role, Mapping[str, float]]
    inputs_together: Mapping[str, float]  # as `together`; fixed scales are as those that every token has of its own
    states: Mapping[tuple[str, str, str], float]  # by kind, format and rounding
    scales: Mapping[tuple[str, str], float]  # how many times that where scales are static, or along d_inner
    removed: Mapping[float, float]  # by the share of experts that were removed, what stays corrected
    uncorrected: float  # how many times that where it is not
    tail: float  # the 99th percentile over the mean, at most
    fused_apart: float  # as `APART`, where only onnxruntime rounds inputs
    hidden: Mapping[str, float]  # by the format of hidden states, and of states and caches that no pass decided on

    def apart_of(self, rounded: str) -> float:
        return self.fused_apart if rounded == FUSED else APART

    def weights_of(self, role: Role, base: str) -> float:
        return _of_role(self.weights, role, base)

    def inputs_of(self, role: Role, rounded: str) -> float:
        return _of_role(self.inputs, role, rounded)

    def states_of(self, kind: str, number_format: str, rounding: str, scale: str) -> float:
        """Rounded in a way that was not measured: as the costliest that was."""
        if number_format == "fp32":
            return 0.0
        alike = [cost for (of, form, _), cost in self.states.items() if (of, form) == (kind, number_format)]
        cost = self.states.get((kind, number_format, rounding), max(alike))
        return cost * self.scales.get((kind, scale), 1.0)

    def weights_at_once(self, base: str, alone: float, rounded: float) -> float:
        """What roles cost together that cost `alone` in all, each by itself; `rounded` is the same rounded to nearest in the
        base: the nearer to all roles that is, the more of their tokens are the same."""
        return _at_once(self.together[base], alone, rounded / sum(row[base] for row in self.weights.values()))

    def inputs_at_once(self, rounded: str, alone: float, fused: float) -> float:
        """The same of inputs; `fused` is what they would cost in that form, which tells how many of all they are."""
        together = self.inputs_together[rounded.replace("static", "dynamic")]
        return _at_once(together, alone, fused / sum(row[FUSED] for row in self.inputs.values()))

    def pruned(self, share: float, corrected: bool) -> float:
        """By the logarithm between shares that were measured, and beyond them."""
        pairs = list(pairwise(sorted(self.removed.items())))
        (low, less), (high, more) = next((pair for pair in pairs if share <= pair[1][0]), pairs[-1])
        cost: float = less * (more / less) ** ((share - low) / (high - low))
        return cost if corrected else cost * self.uncorrected


def _at_once(together: float, alone: float, share: float) -> float:
    return alone * (1 - (1 - together) * min(1.0, share))


def _of_role(table: Mapping[Role, Mapping[str, float]], role: Role, column: str) -> float:
    found = table.get(role)
    return found[column] if found else max(of_role[column] for of_role in table.values())


def of_family(model_type: str) -> Costs:
    """Of a family that was not measured, those of the one whose matrices cost more."""
    return COSTS.get(model_type) or max(
        COSTS.values(), key=lambda costs: sum(row["int8"] for row in costs.weights.values())
    )


COSTS: dict[str, Costs] = {
    "jamba": Costs(
        weights={
            Role.ATTENTION_OUT: {"int8": 9.2e-06, "int4-g32": 0.0011, "fp8-e4m3": 9.4e-05},
            Role.ATTENTION_QKV: {"int8": 5e-05, "int4-g32": 0.0062, "fp8-e4m3": 0.0006},
            Role.EMBEDDING: {"int8": 3.7e-05, "int4-g32": 0.0033, "fp8-e4m3": 0.00033},
            Role.EXPERTS: {"int8": 8e-05, "int4-g32": 0.0075, "fp8-e4m3": 0.00069},
            Role.LM_HEAD: {"int8": 0.00021, "int4-g32": 0.045, "fp8-e4m3": 0.0055},
            Role.MLP: {"int8": 7.4e-05, "int4-g32": 0.0075, "fp8-e4m3": 0.00076},
            Role.SSM_DT_PROJ: {"int8": 8.9e-07, "int4-g32": 8.9e-07, "fp8-e4m3": 6.8e-05},
            Role.SSM_IN: {"int8": 5.5e-05, "int4-g32": 0.005, "fp8-e4m3": 0.00046},
            Role.SSM_OUT: {"int8": 3.7e-05, "int4-g32": 0.0037, "fp8-e4m3": 0.00045},
            Role.SSM_X_PROJ: {"int8": 1.1e-06, "int4-g32": 0.0002, "fp8-e4m3": 3.6e-05},
        },
        together={"int8": 0.79, "int4-g32": 0.98, "fp8-e4m3": 0.93},
        formats={
            "int8": ("int8", 1.0),
            "int4-g32": ("int4-g32", 1.0),
            "fp8-e4m3": ("fp8-e4m3", 1.0),
            "int8-tensor": ("int8", 6.1),
            "int8-g32": ("int8", 0.79),
            "int8-g16": ("int8", 0.6),
            "int4-g16": ("int4-g32", 0.82),
            "int4-g64": ("int4-g32", 1.0),
            "int4-g128": ("int4-g32", 1.0),
            "fp8-e4m3-tensor": ("fp8-e4m3", 1.0),
            "fp8-e4m3-b128": ("fp8-e4m3", 1.1),
        },
        compensated={"int8": 0.55, "int4-g32": 0.46, "fp8-e4m3": 0.49},
        inputs={
            Role.ATTENTION_OUT: {
                "dynamic-int8": 1.6e-05,
                "dynamic-fp8": 4.9e-05,
                "fused-int8": 6.5e-06,
                "static-int8": 4.3e-05,
                "static-fp8": 6.3e-05,
                "static-int8 rotated": 2.4e-05,
            },
            Role.ATTENTION_QKV: {
                "dynamic-int8": 2e-05,
                "dynamic-fp8": 0.00025,
                "fused-int8": 6.8e-06,
                "static-int8": 4e-05,
                "static-fp8": 0.00026,
                "static-int8 rotated": 4.6e-05,
            },
            Role.EXPERTS: {
                "dynamic-int8": 0.00015,
                "dynamic-fp8": 0.00061,
                "fused-int8": 5.6e-05,
                "static-int8": 0.0017,
                "static-fp8": 0.0007,
                "static-int8 rotated": 0.00014,
            },
            Role.LM_HEAD: {
                "dynamic-int8": 0.00011,
                "dynamic-fp8": 0.00065,
                "fused-int8": 4.5e-05,
                "static-int8": 0.00027,
                "static-fp8": 0.00084,
                "static-int8 rotated": 0.00012,
            },
            Role.MLP: {
                "dynamic-int8": 0.00038,
                "dynamic-fp8": 0.00075,
                "fused-int8": 0.00014,
                "static-int8": 0.0031,
                "static-fp8": 0.00089,
                "static-int8 rotated": 0.00025,
            },
            Role.SSM_DT_PROJ: {
                "dynamic-int8": 1.5e-06,
                "dynamic-fp8": 3.5e-05,
                "fused-int8": 0.0,
                "static-int8": 1.6e-05,
                "static-fp8": 7e-05,
                "static-int8 rotated": 1.6e-05,
            },
            Role.SSM_IN: {
                "dynamic-int8": 6.2e-05,
                "dynamic-fp8": 0.00043,
                "fused-int8": 4.4e-05,
                "static-int8": 0.00011,
                "static-fp8": 0.00042,
                "static-int8 rotated": 9.7e-05,
            },
            Role.SSM_OUT: {
                "dynamic-int8": 0.00014,
                "dynamic-fp8": 0.00031,
                "fused-int8": 4.7e-05,
                "static-int8": 0.0034,
                "static-fp8": 0.00046,
                "static-int8 rotated": 0.00019,
            },
            Role.SSM_X_PROJ: {
                "dynamic-int8": 9e-06,
                "dynamic-fp8": 2.6e-05,
                "fused-int8": 2.4e-05,
                "static-int8": 7.6e-05,
                "static-fp8": 3.5e-05,
                "static-int8 rotated": 5.8e-06,
            },
        },
        inputs_together={"dynamic-int8": 0.92, "dynamic-fp8": 0.86, "fused-int8": 0.86},
        states={
            ("ssm_state", "bf16", "nearest"): 5.4e-06,
            ("ssm_state", "bf16", "stochastic"): 1.7e-06,
            ("ssm_state", "fp16", "nearest"): 2.6e-08,
            ("ssm_state", "fp8-e4m3", "nearest"): 0.0015,
            ("ssm_state", "fp8-e4m3", "stochastic"): 0.00024,
            ("ssm_state", "int8", "nearest"): 7.2e-05,
            ("ssm_state", "int8", "stochastic"): 1e-05,
            ("ssm_state", "int4", "nearest"): 0.0083,
            ("ssm_state", "int4", "stochastic"): 0.0016,
            ("conv_state", "bf16", "nearest"): 1.5e-06,
            ("conv_state", "fp16", "nearest"): 2.2e-08,
            ("kv_cache", "bf16", "nearest"): 1.2e-06,
            ("kv_cache", "fp16", "nearest"): 7.7e-09,
            ("kv_cache", "fp8-e4m3", "nearest"): 0.00012,
            ("kv_cache", "int8", "nearest"): 3e-05,
            ("kv_cache", "int4", "nearest"): 0.0017,
            ("kv_cache", "int4", "stochastic"): 0.0025,
            ("conv_state", "int8", "nearest"): 6.4e-5,
            ("conv_state", "int4", "nearest"): 0.02,
            ("conv_state", "fp8-e4m3", "nearest"): 0.0005,
        },
        scales={("ssm_state", "static"): 22.0, ("ssm_state", "d_inner"): 20.0, ("kv_cache", "static"): 35.0},
        removed={0.125: 0.00015, 0.25: 0.00043, 0.375: 0.00086, 0.5: 0.0264},
        uncorrected=2.9,
        tail=12.0,
        fused_apart=1.15,  # measured: 0.58 to 0.8
        hidden={"bf16": 9e-05, "fp16": 5e-07, "fp32": 0.0},
    ),
    "nemotron_h": Costs(
        weights={
            Role.ATTENTION_OUT: {"int8": 0.00013, "int4-g32": 0.0017, "fp8-e4m3": 0.0006},
            Role.ATTENTION_QKV: {"int8": 0.0002, "int4-g32": 0.0063, "fp8-e4m3": 0.001},
            Role.EMBEDDING: {"int8": 0.0004, "int4-g32": 0.0064, "fp8-e4m3": 0.0013},
            Role.EXPERTS: {"int8": 0.00023, "int4-g32": 0.0095, "fp8-e4m3": 0.0011},
            Role.LM_HEAD: {"int8": 0.00012, "int4-g32": 0.023, "fp8-e4m3": 0.0022},
            Role.MLP: {"int8": 2.8e-05, "int4-g32": 0.0011, "fp8-e4m3": 8.9e-05},
            Role.SHARED_EXPERTS: {"int8": 0.0001, "int4-g32": 0.0045, "fp8-e4m3": 0.00092},
            Role.SSM_IN: {"int8": 0.00042, "int4-g32": 0.011, "fp8-e4m3": 0.0015},
            Role.SSM_OUT: {"int8": 0.00037, "int4-g32": 0.0067, "fp8-e4m3": 0.0017},
        },
        together={"int8": 0.52, "int4-g32": 0.84, "fp8-e4m3": 0.6},
        formats={
            "int8": ("int8", 1.0),
            "int4-g32": ("int4-g32", 1.0),
            "fp8-e4m3": ("fp8-e4m3", 1.0),
            "int8-tensor": ("int8", 2.3),
            "int8-g32": ("int8", 0.78),
            "int8-g16": ("int8", 0.49),
            "int4-g16": ("int4-g32", 0.92),
            "int4-g64": ("int4-g32", 1.2),
            "int4-g128": ("int4-g32", 1.2),
            "fp8-e4m3-tensor": ("fp8-e4m3", 1.1),
            "fp8-e4m3-b128": ("fp8-e4m3", 1.1),
        },
        compensated={"int8": 0.52, "int4-g32": 0.41, "fp8-e4m3": 0.45},
        inputs={
            Role.ATTENTION_OUT: {
                "dynamic-int8": 0.00013,
                "dynamic-fp8": 0.00049,
                "fused-int8": 0.00013,
                "static-int8": 0.00024,
                "static-fp8": 0.00054,
                "static-int8 rotated": 0.00027,
            },
            Role.ATTENTION_QKV: {
                "dynamic-int8": 6.3e-05,
                "dynamic-fp8": 0.0009,
                "fused-int8": 0.00017,
                "static-int8": 0.00026,
                "static-fp8": 0.0011,
                "static-int8 rotated": 0.00041,
            },
            Role.EXPERTS: {
                "dynamic-int8": 0.00041,
                "dynamic-fp8": 0.00095,
                "fused-int8": 0.00032,
                "static-int8": 0.0021,
                "static-fp8": 0.0009,
                "static-int8 rotated": 0.00074,
            },
            Role.LM_HEAD: {
                "dynamic-int8": 6e-05,
                "dynamic-fp8": 0.00045,
                "fused-int8": 2.9e-05,
                "static-int8": 0.00023,
                "static-fp8": 0.00049,
                "static-int8 rotated": 7.9e-05,
            },
            Role.MLP: {
                "dynamic-int8": 3.5e-05,
                "dynamic-fp8": 0.00011,
                "fused-int8": 4.5e-05,
                "static-int8": 0.0019,
                "static-fp8": 0.00031,
                "static-int8 rotated": 0.00028,
            },
            Role.SHARED_EXPERTS: {
                "dynamic-int8": 0.00017,
                "dynamic-fp8": 0.00064,
                "fused-int8": 0.00024,
                "static-int8": 0.0012,
                "static-fp8": 0.00065,
                "static-int8 rotated": 0.00063,
            },
            Role.SSM_IN: {
                "dynamic-int8": 0.00038,
                "dynamic-fp8": 0.0012,
                "fused-int8": 0.00028,
                "static-int8": 0.00074,
                "static-fp8": 0.0016,
                "static-int8 rotated": 0.00058,
            },
            Role.SSM_OUT: {
                "dynamic-int8": 0.00094,
                "dynamic-fp8": 0.0017,
                "fused-int8": 0.00052,
                "static-int8": 0.0018,
                "static-fp8": 0.0014,
                "static-int8 rotated": 0.00038,
            },
        },
        inputs_together={"dynamic-int8": 0.61, "dynamic-fp8": 0.58, "fused-int8": 0.48},
        states={
            ("ssm_state", "bf16", "nearest"): 4.1e-06,
            ("ssm_state", "bf16", "stochastic"): 5.5e-06,
            ("ssm_state", "fp16", "nearest"): 2.3e-05,
            ("ssm_state", "fp8-e4m3", "nearest"): 0.0004,
            ("ssm_state", "fp8-e4m3", "stochastic"): 0.00026,
            ("ssm_state", "int8", "nearest"): 0.00011,
            ("ssm_state", "int8", "stochastic"): 5.3e-05,
            ("ssm_state", "int4", "nearest"): 0.0022,
            ("ssm_state", "int4", "stochastic"): 0.0018,
            ("conv_state", "bf16", "nearest"): 9.6e-05,
            ("conv_state", "fp16", "nearest"): 1.4e-08,
            ("kv_cache", "bf16", "nearest"): 2.3e-05,
            ("kv_cache", "fp16", "nearest"): 2.3e-05,
            ("kv_cache", "fp8-e4m3", "nearest"): 0.00054,
            ("kv_cache", "int8", "nearest"): 4.8e-05,
            ("kv_cache", "int4", "nearest"): 0.003,
            ("kv_cache", "int4", "stochastic"): 0.0044,
            ("conv_state", "int8", "nearest"): 6.4e-5,
            ("conv_state", "int4", "nearest"): 0.02,
            ("conv_state", "fp8-e4m3", "nearest"): 0.0005,
        },
        scales={("ssm_state", "static"): 52.0, ("ssm_state", "d_inner"): 2.0, ("kv_cache", "static"): 35.0},
        removed={0.125: 0.0267, 0.25: 0.0534},  # a quarter was measured; an eighth is assumed to cost half of it
        uncorrected=1.6,
        tail=25.0,
        fused_apart=0.65,  # measured: 0.38 to 0.43
        hidden={"bf16": 0.00032, "fp16": 5e-05, "fp32": 0.0},
    ),
}
