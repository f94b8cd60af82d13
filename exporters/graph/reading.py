"""Reads an exported model.onnx back; its weights stay in the data file until they are asked for."""

from pathlib import Path

import onnx_ir as ir

from compress.checkpoint.reader import parse_config
from compress.disk.pointers import refuse_pointer
from compress.errors import InputError, first_line
from compress.model.architecture import Architecture
from compress.model.hybrid import HybridModel
from compress.strict import json_text
from compress.strict.json_text import JsonObject
from exporters.graph import weights
from exporters.graph.builder import FORMAT_KEY
from exporters.graph.members import members

CONFIG_KEY = "compress.config"  # metadata that carries config.json


def load(path: Path) -> ir.Model:
    """The graph; weights stay on disk. Raises InputError for what is not an ONNX model."""
    refuse_pointer(path)
    try:
        return ir.load(path)
    except Exception as error:  # protobuf raises its own DecodeError, onnx-ir several kinds
        raise InputError(f"{path}: not a readable ONNX model ({first_line(error)})") from None


def architecture(model: ir.Model, path: Path) -> Architecture:
    """The family and configuration of the checkpoint a graph was exported from."""
    return parse_config(_config(model, path), _source(path))


def hybrid(model: ir.Model, path: Path) -> HybridModel:
    """The weights of a graph, as they lie in its data file, in the units of the checkpoint it was exported from."""
    return weights.model(model, architecture(model, path), _config(model, path), path)


def _source(path: Path) -> str:
    return f"{path}: '{CONFIG_KEY}' in its metadata"


def _config(model: ir.Model, path: Path) -> JsonObject:
    """The checkpoint's config.json."""
    if CONFIG_KEY not in model.metadata_props:
        raise InputError(f"{path}: was not exported by this tool (no '{CONFIG_KEY}' in its metadata)")
    try:
        values = json_text.loads(model.metadata_props[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{_source(path)}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{_source(path)}: expected a JSON object")
    return values


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Every weight in the data file, those of branches included, and each member of a stack by its own name."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    stored = (value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor))
    return [member for tensor in stored for member in members(tensor)]


def stored_formats(tensors: list[ir.ExternalTensor]) -> dict[str, str]:
    """The number format of every weight by name; scales carry none, they belong to their weight."""
    weights = (tensor for tensor in tensors if FORMAT_KEY in tensor.metadata_props)
    return {tensor.name: tensor.metadata_props[FORMAT_KEY] for tensor in sorted(weights, key=lambda t: t.name)}


def stored_parameters(tensors: list[ir.ExternalTensor]) -> dict[str, int]:
    """Parameters by number format."""
    counts: dict[str, int] = {}
    names = stored_formats(tensors)
    for tensor in tensors:
        if name := names.get(tensor.name):
            counts[name] = counts.get(name, 0) + tensor.size * _per_element(tensor, name)
    return counts


def _per_element(tensor: ir.ExternalTensor, number_format: str) -> int:
    """int4 values that are looked up lie two to a byte (table.py)."""
    return 2 if number_format.startswith("int4") and tensor.dtype == ir.DataType.UINT8 else 1
