"""`compress inspect`: what a model or an artifact is made of. A folder with only config.json is enough for the arithmetic."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from compress import plugins
from compress.checkpoint.reader import Checkpoint, config_dtype, has_weights, open_config
from compress.errors import InputError
from compress.model import sizes
from compress.model.architecture import Architecture
from compress.model.block import Layer
from compress.model.states import StateKind
from compress.model.weight import Unit, UnitSpec
from compress.output_folder import integrity
from compress.recipe import source
from compress.runtime import graph_names
from compress.runtime.artifacts import find_artifact
from compress.terminal.escaping import printable

if TYPE_CHECKING:
    import onnx_ir as ir


class LayerFacts(TypedDict):
    index: int
    kind: str
    experts: int
    router_rows: NotRequired[int]  # only where the router has rows of experts that were removed


class ExpertFacts(TypedDict):
    total: int
    active: int


class VerifiedFacts(TypedDict):
    files: int
    bytes: int


class Facts(TypedDict):
    """What is told of a model or an artifact, as `--json` writes it."""

    model_type: str
    parameters: int
    active_parameters: int
    roles: dict[str, int]
    experts: ExpertFacts
    layers: list[LayerFacts]
    kv_bytes_per_token: int
    ssm_state_bytes: int
    conv_state_bytes: int
    state_memory: dict[str, sizes.MemoryFacts]  # by kind, and in all
    states: list[sizes.StateFacts]  # that are kept in a format of their own
    weight_bytes: int
    formats: dict[str, int]
    travelling: NotRequired[list[str]]
    verified: NotRequired[VerifiedFacts]


def inspect(name: str, *, verify: bool = False) -> Facts:
    """Facts about a local folder, a hub id, an output of `apply` or a model.onnx.

    `verify` reads every file of what is named and compares its digest with the manifest's.
    """
    path = Path(name)
    verified = _verify(path) if verify else None
    artifact = find_artifact(path) if path.exists() else source.resolve(name, config_only=True).folder
    integrity.verify(artifact)
    facts = _facts(artifact)
    if verified is not None:
        facts["verified"] = VerifiedFacts(files=verified.files, bytes=verified.bytes)
    return facts


def _verify(path: Path) -> integrity.Verified:
    verified = integrity.verify(path, digests=True)
    if verified is None:
        raise InputError(f"{path}: --verify has nothing to compare with; no manifest.json of this tool lists its files")
    return verified


def _facts(artifact: Path) -> Facts:
    if artifact.suffix == ".onnx":
        return _onnx_facts(artifact)
    if has_weights(artifact):
        return _checkpoint_facts(artifact)
    return _config_facts(artifact)


def _config_facts(folder: Path) -> Facts:
    """From config.json alone: weights count in the type it names (bfloat16 where it names none)."""
    architecture, values = open_config(folder)
    units = list(architecture.layout())
    dtype = config_dtype(values, str(folder / "config.json"))
    weight_bytes = dtype.itemsize * sizes.total_parameters(units)
    return _described(architecture, units, sizes.state_bytes(architecture), weight_bytes, {})


def _checkpoint_facts(folder: Path) -> Facts:
    model = Checkpoint(folder, allow_quantized=True).model
    weight_bytes, formats = sizes.stored_bytes(model.units), sizes.parameters_by_format(model.weights)
    states = sizes.state_bytes(model.architecture)
    facts = _described(model.architecture, model.units, states, weight_bytes, formats)
    if model.travellers:
        facts["travelling"] = [weight.name for weight in model.travellers]
    return facts


def _onnx_facts(path: Path) -> Facts:
    """An exported graph carries its model's config.json; states count in the types the graph declares."""
    reading = plugins.graph_reading()
    graph = reading.load(path)
    architecture = reading.architecture(graph, path)
    tensors = reading.external_tensors(graph)
    weight_bytes, formats = sum(tensor.nbytes for tensor in tensors), reading.stored_parameters(tensors)
    states = _declared_state_bytes(architecture, graph)
    return _described(architecture, list(architecture.layout()), states, weight_bytes, formats)


def _declared_state_bytes(architecture: Architecture, graph: "ir.Model") -> sizes.StateBytes:
    """State bytes of one sequence in the types of the graph's past inputs."""
    kinds = {spec.name: spec.kind for layer in architecture.layers for spec in layer.carried}
    totals = dict.fromkeys(StateKind, 0)
    for value in graph.graph.inputs:
        name = value.name or ""
        kind = kinds.get(graph_names.kind_of(name)) if graph_names.is_past(name) else None
        if kind is not None and value.shape is not None and value.dtype is not None:
            sizes_known = [size for size in value.shape if isinstance(size, int)]
            totals[kind] += int(math.prod(sizes_known) * value.dtype.itemsize)
    return sizes.StateBytes(totals[StateKind.KV], totals[StateKind.SSM], totals[StateKind.CONV])


def _described(architecture: Architecture, units: Sequence[Unit | UnitSpec], states: sizes.StateBytes, weight_bytes: int,
               formats: dict[str, int]) -> Facts:  # fmt: skip
    layers = list(map(_layer_facts, architecture.layers))
    experts = max(layer["experts"] for layer in layers)
    return Facts(
        model_type=architecture.model_type,
        parameters=sizes.total_parameters(units),
        active_parameters=sizes.active_parameters(architecture, units),
        roles={str(role): count for role, count in sizes.parameters_by_role(units).items()},
        experts=ExpertFacts(total=experts, active=architecture.config.num_experts_per_tok if experts > 1 else 1),
        layers=layers,
        kv_bytes_per_token=states.kv_bytes_per_token,
        ssm_state_bytes=states.ssm_state_bytes,
        conv_state_bytes=states.conv_state_bytes,
        state_memory=states.memory(),
        states=sizes.states_as_kept(architecture),
        weight_bytes=weight_bytes,
        formats=formats,
    )


def _layer_facts(layer: Layer) -> LayerFacts:
    facts = LayerFacts(index=layer.index, kind=layer.kind, experts=layer.num_experts)
    if layer.experts and layer.experts.router.rows != layer.num_experts:
        facts["router_rows"] = layer.experts.router.rows
    return facts


def as_text(facts: Facts) -> str:
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
        *(f"remembered at {tokens:>7}  {size:,} bytes" for tokens, size in _totals(facts).items()),
        *(f"kept as {form:<14} {states}" for form, states in _kept_states(facts).items()),
        f"layers                 {len(kinds)}: {' '.join(kinds)}",
    ]
    lines += [f"verified               {verified['files']} files, {verified['bytes']:,} bytes"] if verified else []
    lines += [f"stored as {name:<12} {count:,} parameters" for name, count in facts["formats"].items()]
    lines += [f"{role:<22} {count:,}" for role, count in sorted(facts["roles"].items(), key=lambda item: -item[1])]
    lines += [f"travels unused         {name}" for name in facts.get("travelling", [])]
    return "\n".join(map(printable, lines))


def _totals(facts: Facts) -> dict[str, int]:
    """Of all states of one sequence, by tokens read: 4K, 32K, 256K."""
    return {f"{int(tokens) // 1024}K": size for tokens, size in facts["state_memory"]["total"]["at"].items()}


def _kept_states(facts: Facts) -> dict[str, str]:
    """Formats of states, each with how many layers keep which kind so."""
    counts: dict[str, Counter[str]] = {}
    for row in facts["states"]:
        form = row["format"] + (", stochastic" if row["rounding"] == "stochastic" else "")
        counts.setdefault(form, Counter())[row["kind"]] += 1
    return {
        form: ", ".join(f"{kind} of {count} layers" for kind, count in kinds.items()) for form, kinds in counts.items()
    }


def _expert_range(facts: Facts) -> str:
    """Of the layers that have experts; where they differ, from the fewest to the most."""
    counts = [layer["experts"] for layer in facts["layers"] if layer["experts"] > 1] or [1]
    return str(max(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
