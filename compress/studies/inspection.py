"""`compress inspect`: what a model or an artifact is made of. A folder with only config.json is enough for the arithmetic."""

import math
from collections.abc import Sequence
from pathlib import Path

from compress.checkpoint.reader import Checkpoint, config_dtype, has_weights, open_config
from compress.errors import InputError
from compress.model import sizes
from compress.model.architecture import Architecture
from compress.model.block import Layer
from compress.model.weight import Unit, UnitSpec
from compress.output_folder import integrity
from compress.recipe import source
from compress.runtime import onnx_layouts
from compress.runtime.artifacts import find_artifact
from compress.terminal.escaping import printable


def inspect(name: str, *, verify: bool = False) -> dict:
    """Facts about a local folder, a hub id, an output of `apply` or a model.onnx, ready for JSON.

    `verify` reads every file of what is named and compares its digest with the manifest's.
    """
    path = Path(name)
    verified = {"verified": vars(_verify(path))} if verify else {}
    artifact = find_artifact(path) if path.exists() else source.resolve(name, config_only=True).folder
    integrity.verify(artifact)
    return _facts(artifact) | verified


def _verify(path: Path) -> integrity.Verified:
    verified = integrity.verify(path, digests=True)
    if verified is None:
        raise InputError(f"{path}: --verify has nothing to compare with; no manifest.json of this tool lists its files")
    return verified


def _facts(artifact: Path) -> dict:
    if artifact.suffix == ".onnx":
        return _onnx_facts(artifact)
    if has_weights(artifact):
        return _checkpoint_facts(artifact)
    return _config_facts(artifact)


def _config_facts(folder: Path) -> dict:
    """From config.json alone: weights count in the type it names (bfloat16 where it names none)."""
    architecture, values = open_config(folder)
    units = list(architecture.layout())
    dtype = config_dtype(values, str(folder / "config.json"))
    facts = _architecture_facts(architecture, units)
    return facts | {"weight_bytes": dtype.itemsize * facts["parameters"], "formats": {}}


def _checkpoint_facts(folder: Path) -> dict:
    checkpoint = Checkpoint(folder, allow_quantized=True)
    model = checkpoint.model
    facts = _architecture_facts(model.architecture, model.units)
    return facts | {
        "weight_bytes": sizes.stored_bytes(model.units),
        "formats": sizes.parameters_by_format(model.weights),
        **({"travelling": [weight.name for weight in model.travellers]} if model.travellers else {}),
    }


def _onnx_facts(path: Path) -> dict:
    """An exported graph carries its model's config.json; states count in the types the graph declares."""
    from exporters.graph import reading

    graph = reading.load(path)
    architecture = reading.architecture(graph, path)
    units = list(architecture.layout())
    tensors = reading.external_tensors(graph)
    facts = _architecture_facts(architecture, units)
    stored = {"weight_bytes": sum(tensor.nbytes for tensor in tensors), "formats": reading.stored_parameters(tensors)}
    return facts | _declared_state_bytes(graph) | stored


def _declared_state_bytes(graph) -> dict[str, int]:
    """State bytes of one sequence from the graph's past inputs."""
    totals = {"key": 0, "value": 0, "recurrent_state": 0, "conv_state": 0}
    for value in graph.graph.inputs:
        kind = onnx_layouts.kind_of(value.name) if onnx_layouts.is_past(value.name) else None
        if kind in totals and value.shape is not None and value.dtype is not None:
            sizes_known = [size for size in value.shape if isinstance(size, int)]
            totals[kind] += int(math.prod(sizes_known) * value.dtype.itemsize)
    return sizes.StateBytes(totals["key"] + totals["value"], totals["recurrent_state"], totals["conv_state"]).to_json()


def _architecture_facts(architecture: Architecture, units: Sequence[Unit | UnitSpec]) -> dict:
    layers = list(map(_layer_facts, architecture.layers))
    experts = max(layer["experts"] for layer in layers)
    return {
        "model_type": architecture.model_type,
        "parameters": sizes.total_parameters(units),
        "active_parameters": sizes.active_parameters(architecture, units),
        "roles": {str(role): count for role, count in sizes.parameters_by_role(units).items()},
        "experts": {"total": experts, "active": architecture.config.num_experts_per_tok if experts > 1 else 1},
        "layers": layers,
        **sizes.state_bytes(architecture).to_json(),
    }


def _layer_facts(layer: Layer) -> dict:
    """`router_rows` only where the router has rows of experts that were removed."""
    facts = {"index": layer.index, "kind": layer.kind, "experts": layer.num_experts}
    rows = layer.experts.router.rows if layer.experts else layer.num_experts
    return facts if rows == layer.num_experts else facts | {"router_rows": rows}


def as_text(facts: dict) -> str:
    """The facts for a terminal."""
    verified = facts.get("verified")
    kinds = [
        layer["kind"] + ("+moe" if layer["experts"] > 1 and layer["kind"] != "moe" else "") for layer in facts["layers"]
    ]
    lines = [
        f"model_type             {facts['model_type']}",
        f"parameters             {facts['parameters']:,}",
        f"active_parameters      {facts['active_parameters']:,}",
        f"weight_bytes           {facts['weight_bytes']:,}",
        f"experts                {_expert_range(facts)}, {facts['experts']['active']} active",
        f"kv_bytes_per_token     {facts['kv_bytes_per_token']:,}",
        f"ssm_state_bytes        {facts['ssm_state_bytes']:,} per sequence",
        f"conv_state_bytes       {facts['conv_state_bytes']:,} per sequence",
        f"layers                 {len(kinds)}: {' '.join(kinds)}",
    ]
    lines += [f"verified               {verified['files']} files, {verified['bytes']:,} bytes"] if verified else []
    lines += [f"stored as {name:<12} {count:,} parameters" for name, count in facts["formats"].items()]
    lines += [f"{role:<22} {count:,}" for role, count in sorted(facts["roles"].items(), key=lambda item: -item[1])]
    lines += [f"travels unused         {name}" for name in facts.get("travelling", [])]
    return "\n".join(map(printable, lines))


def _expert_range(facts: dict) -> str:
    """Of the layers that have experts; where they differ, from the fewest to the most."""
    counts = [layer["experts"] for layer in facts["layers"] if layer["experts"] > 1] or [1]
    return str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
