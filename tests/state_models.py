"""Checkpoints whose states are kept in number formats, with static scales beside the weights where they are asked for."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from stepping import OwnSteps

from compress.checkpoint.reader import Checkpoint, open_config
from compress.formats.remembered import MOST
from compress.model.states import StateKind, StateSpec

ALL = ("recurrent_state", "conv_state", "key", "value")


def with_states(source: Path, folder: Path, states: Mapping[str, Mapping[str, Any]], layers=None) -> Path:
    """A copy of a checkpoint with these settings of its states by name, in all layers or some."""
    shutil.copytree(source, folder)
    architecture, config = open_config(source)
    kept = [
        {"layer": layer.index, "state": spec.name, **_possible(spec, states[spec.name])}
        for layer in architecture.layers
        for spec in layer.states
        if spec.name in states and (layers is None or layer.index in layers)
    ]
    (folder / "config.json").write_text(json.dumps(config | {"compress": {"states": kept}}))
    _write_scales(source, folder)
    return folder


def _possible(spec: StateSpec, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What only a recurrent state can have is left out of others. A convolution state has too few entries to carry scales of
    its own: it is kept in bfloat16 then."""
    if spec.kind != StateKind.SSM:
        settings = {word: value for word, value in settings.items() if word not in ("residual", "every", "axis")}
        if settings.get("rounding") == "error_feedback":
            settings |= {"rounding": "nearest"}
    carries = settings["format"] in MOST and settings.get("scale", "dynamic") == "dynamic"
    return {"format": "bf16"} if spec.kind == StateKind.CONV and carries else settings


def _write_scales(source: Path, folder: Path) -> None:
    """Those of what the model remembers after some random tokens."""
    specs = [(layer, spec) for layer in open_config(folder)[0].layers for spec in layer.states]
    static = [(layer, spec) for layer, spec in specs if spec.precision.has_static_scale]
    if not static:
        return
    steps = OwnSteps(Checkpoint(source, allow_quantized=True).model)
    steps.step(torch.randint(3, 60, (4, 48), generator=torch.Generator().manual_seed(1)))
    path = folder / "model.safetensors"
    added = {
        layer.prefix + spec.scale_name: _scales(steps.states[layer.index][spec.name], spec) for layer, spec in static
    }
    save_file(load_file(path) | added, path, metadata={"format": "pt"})


def _scales(value: torch.Tensor, spec) -> torch.Tensor:
    """value [B, ...] -> the scales of one sequence, that hold all of it and a little more."""
    largest = value.abs().amax(0)
    if spec.grows is not None:
        largest = largest.amax(spec.grows, keepdim=True)
    axis, block = spec.precision.axis, spec.precision.block or largest.shape[spec.precision.axis]
    blocks = [part.amax(axis, keepdim=True) for part in largest.split(block, axis)]
    return (torch.cat(blocks, axis) * 1.1 / MOST[spec.precision.format]).clamp_min(1e-6).contiguous()
