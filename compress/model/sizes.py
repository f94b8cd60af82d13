"""What a model weighs: parameters, bytes of weights, bytes of state per sequence and per token."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from compress.model.roles import Role
from compress.model.weight import Unit, UnitSpec

STATE_BYTES = {"ssm": 4, "conv": 2, "kv": 2}  # float32 SSM state, bfloat16 convolution state and KV: the usual runtimes


@dataclass(frozen=True)
class StateBytes:
    """Per sequence; `kv_bytes_per_token` grows with the context."""

    kv_bytes_per_token: int
    ssm_state_bytes: int
    conv_state_bytes: int

    def to_json(self) -> dict:
        return asdict(self)


def state_bytes(architecture, config) -> StateBytes:
    """From the configuration alone; shapes as in `layers.py`, types as in STATE_BYTES."""
    kinds = [architecture.layer_kind(config, index) for index in range(config.num_hidden_layers)]
    attention, mamba = kinds.count("attention"), kinds.count("mamba")
    return StateBytes(
        attention * 2 * config.num_key_value_heads * config.attention_head_dim * STATE_BYTES["kv"],
        mamba * config.mamba_d_state * config.d_inner * STATE_BYTES["ssm"],
        mamba * config.d_inner * (config.mamba_d_conv - 1) * STATE_BYTES["conv"],
    )


def active_parameters(architecture, config, units) -> int:
    """Parameters that work on one token: top-k of the experts, everything else whole."""
    return round(sum(architecture.active_share(config, item) * parameters for item, parameters in _sized(units)))


def total_parameters(units) -> int:
    return sum(parameters for _, parameters in _sized(units))


def parameters_by_format(weights) -> dict[str, int]:
    """By the number format they are stored in."""
    counts: dict[str, int] = {}
    for weight in weights:
        counts[weight.format] = counts.get(weight.format, 0) + weight.parameters
    return counts


def parameters_by_role(units) -> dict[Role, int]:
    totals: dict[Role, int] = {}
    for item, parameters in _sized(units):
        totals[item.role] = totals.get(item.role, 0) + parameters
    return totals


def _sized(units):
    """(spec or weight, parameters) of unit specs and of opened units alike."""
    for unit in units:
        items = unit.specs if isinstance(unit, UnitSpec) else unit.weights.values()
        for item in items:
            yield item, math.prod(item.shape)


def stored_bytes(units: Iterable[Unit]) -> int:
    return sum(unit.stored_bytes() for unit in units)
