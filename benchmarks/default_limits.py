"""What formats cost, for the table of default limits: `python benchmarks/default_limits.py PART -m MODEL --json FILE`.

One role is rounded at a time, to nearest, everything else as it came; mean KL to the original on the even half of the windows
(benchmarks/window_pool.py). Inputs that are rounded are measured likewise, with matrices as they came. Formats between those
measured by role are measured with all roles at once.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from machine import describe_machine
from window_pool import Pool, figures

from compress import formats
from compress.check.metrics import Scores
from compress.checkpoint.reader import parse_config
from compress.formats.activations import INT8_MOST, Activation
from compress.model import records
from compress.model.hybrid import HybridModel
from compress.model.records import KeptState
from compress.model.roles import QUANTIZABLE, Role
from compress.model.weight import Weight
from compress.passes.quantization import rounding
from compress.runtime.candidates import CheckpointCandidate

BY_ROLE = ("int8", "int4-g32", "fp8-e4m3")
AT_ONCE = {
    "int8": ("int8-tensor", "int8-g32", "int8-g16"),
    "int4-g32": ("int4-g16", "int4-g64", "int4-g128"),
    "fp8-e4m3": ("fp8-e4m3-tensor", "fp8-e4m3-b128"),
}
DYNAMIC, STATIC = ("dynamic-int8", "dynamic-fp8"), ("static-int8", "static-fp8")
STATES = {
    "ssm_state": ("bf16 nearest", "bf16 stochastic", "fp16 nearest", "fp8-e4m3 nearest", "fp8-e4m3 stochastic", "int8 nearest",
                  "int8 stochastic", "int4 nearest", "int4 stochastic"),
    "conv_state": ("bf16 nearest", "fp16 nearest"),
    "kv_cache": ("bf16 nearest", "fp16 nearest", "fp8-e4m3 nearest", "int8 nearest", "int4 nearest", "int4 stochastic"),
}  # fmt: skip
FUSED = "fused-int8"  # how onnxruntime rounds inputs beside packed integers
KERNEL_BLOCK = 32  # of inputs that onnxruntime's MatMulNBits rounds with one scale
Change = Callable[[Weight], Weight]


@dataclass(frozen=True)
class Blocks(Activation):
    """Inputs as onnxruntime rounds them beside packed integers."""

    format: str = FUSED

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] % KERNEL_BLOCK:
            return x
        blocks = x.unflatten(-1, (-1, KERNEL_BLOCK))
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / INT8_MOST
        return ((blocks / scale).round() * scale).flatten(-2)


@dataclass(frozen=True)
class Listening(Activation):
    """Rounds nothing, and remembers the largest magnitude."""

    format: str = "listening"
    heard: list[float] | None = None

    def fake_quantize(self, x: torch.Tensor) -> torch.Tensor:
        assert self.heard is not None
        self.heard.append(float(x.abs().max()))
        return x


def changed(model: HybridModel, change: Change) -> HybridModel:
    return replace(model, units=tuple(unit.map(change) for unit in model.units))


def rounded(role: Role | None, name: str) -> Change:
    """Matrices of a role (None: of every role) to nearest in a format, or what stands in for it."""

    def change(weight: Weight) -> Weight:
        if weight.role not in QUANTIZABLE or len(weight.shape) != 2 or role not in (None, weight.role):
            return weight
        return rounding.to_nearest(weight, formats.get(formats.fitting(name, weight.shape)), clips=False)

    return change


def with_inputs(role: Role, make: Callable[[Weight], Activation], rotates: bool) -> Change:
    def change(weight: Weight) -> Weight:
        if weight.role != role or len(weight.shape) != 2:
            return weight
        rotation = rounding.rotation_of(weight) if rotates else None
        stored = weight.with_load("fp32", lambda rows=None: rounding.stored_basis(weight, rotation, "cpu", rows))
        return replace(stored, activation=make(weight), rotation=rotation)

    return change


def static_scales(pool: Pool, role: Role, rotates: bool) -> dict[str, float]:
    """The largest magnitude that reaches each matrix of a role."""
    heard: dict[str, list[float]] = {}
    change = with_inputs(role, lambda weight: Listening(heard=heard.setdefault(weight.name, [])), rotates)
    pool.scores(CheckpointCandidate(changed(pool.checkpoint.model, change)))
    return {name: max(found, default=1.0) or 1.0 for name, found in heard.items()}


def inputs(pool: Pool, role: Role) -> dict[str, Change]:
    """Every way of rounding the inputs of a role's matrices."""
    found = {name: with_inputs(role, lambda weight, name=name: Activation(name), False) for name in DYNAMIC}
    found[FUSED] = with_inputs(role, lambda weight: Blocks(), False)
    for rotates in (False, True):
        reach = static_scales(pool, role, rotates)
        for name in STATIC[: 1 if rotates else None]:
            most = formats.activations.largest(name.endswith("fp8"))
            found[f"{name} rotated" if rotates else name] = with_inputs(
                role,
                lambda weight, name=name, reach=reach, most=most: Activation(name, lambda: reach[weight.name] / most),
                rotates,
            )
    return found


def keeping(model: HybridModel, kind: str, form: str) -> HybridModel:
    """The model with all its states of a kind kept in a format, with dynamic scales."""
    number_format, rounding_of = form.split()
    states = [
        KeptState(layer=layer.index, state=spec.name, format=number_format, rounding=rounding_of, seed=place)
        for layer in model.layers
        for place, spec in enumerate(layer.states)
        if spec.kind == kind
    ]
    values = records.with_states(model.config_json, states)
    return replace(model, architecture=parse_config(values, "states"), config_json=values)


def figure(pool: Pool, what: str, model: HybridModel, phase: str = "prefill") -> dict[str, float]:
    start = time.monotonic()
    found = figures(Scores.concatenate(pool.scores(CheckpointCandidate(model), phase)))
    print(f"{what}: {json.dumps(found)} ({time.monotonic() - start:.1f} s)", flush=True)
    return found


def of_weights(pool: Pool) -> dict[str, object]:
    """Figures by role and format, and of formats everywhere at once."""
    model, everywhere = pool.checkpoint.model, [name for base, others in AT_ONCE.items() for name in (base, *others)]
    by_role = {
        role: {name: figure(pool, f"{role} {name}", changed(model, rounded(role, name))) for name in BY_ROLE}
        for role in roles_of(model)
    }
    return {
        "weights": by_role,
        "whole": {name: figure(pool, name, changed(model, rounded(None, name))) for name in everywhere},
    }


def of_inputs(pool: Pool) -> dict[str, object]:
    model = pool.checkpoint.model
    found = {
        role: {
            name: figure(pool, f"inputs of {role} {name}", changed(model, change))
            for name, change in inputs(pool, role).items()
        }
        for role in roles_of(model)
        if role != Role.EMBEDDING
    }
    return {"inputs": found}


def of_inputs_at_once(pool: Pool) -> dict[str, object]:
    """The inputs of all roles that have some."""
    model, found = pool.checkpoint.model, {}
    ways = {name: partial(Activation, name) for name in DYNAMIC} | {FUSED: Blocks}
    for name, make in ways.items():
        whole = model
        for role in set(roles_of(model)) - {Role.EMBEDDING}:
            whole = changed(whole, with_inputs(role, lambda weight, make=make: make(), False))
        found[name] = figure(pool, f"inputs of all {name}", whole)
    return {"inputs_whole": found}


def of_states(pool: Pool) -> dict[str, object]:
    """Decoded token by token."""
    model = pool.checkpoint.model
    found = {
        kind: {form: figure(pool, f"{kind} {form}", keeping(model, kind, form), "decode") for form in forms}
        for kind, forms in STATES.items()
    }
    return {"states": found}


def roles_of(model: HybridModel) -> list[Role]:
    return sorted({weight.role for weight in model.weights if weight.role in QUANTIZABLE})


PARTS = {"weights": of_weights, "inputs": of_inputs, "inputs_whole": of_inputs_at_once, "states": of_states}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--heldout", type=int, default=5, help="Held-out windows, at most.")
    parser.add_argument("--sampled", type=int, default=1, help="Windows sampled with each of two seeds.")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = PARTS[arguments.part](Pool(arguments.model, "even", arguments.heldout, arguments.sampled))
    about = {"machine": describe_machine(), "model": arguments.model.name}
    arguments.json.write_text(json.dumps(about | found, indent=1))


if __name__ == "__main__":
    main()
