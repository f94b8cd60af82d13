"""Reads an exported model.onnx back without its weights."""

import json
from pathlib import Path

import onnx_ir as ir

from compress import plugins
from compress.errors import InputError, first_line
from exporters.graph.blocks import SCALE

CONFIG_KEY = "compress.config"  # metadata that carries config.json
FORMATS = {ir.DataType.INT8: "int8", ir.DataType.FLOAT: "fp32"}


def load(path: Path) -> ir.Model:
    """The graph; weights stay on disk. Raises InputError for what is not an ONNX model."""
    try:
        return ir.load(path)
    except Exception as error:  # protobuf raises its own DecodeError, onnx-ir several kinds
        raise InputError(f"{path}: not a readable ONNX model ({first_line(error)})") from None


def model_config(model: ir.Model, path: Path):
    """Architecture module, validated configuration and config.json of the checkpoint a graph was exported from."""
    if CONFIG_KEY not in model.metadata_props:
        raise InputError(f"{path}: was not exported by this tool (no '{CONFIG_KEY}' in its metadata)")
    values = json.loads(model.metadata_props[CONFIG_KEY])
    architecture = plugins.load(plugins.ARCHITECTURES, values["model_type"])
    return architecture, architecture.parse_config(values, str(path)), values


def external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Every weight in the data file, those of branches included."""
    values = (value for graph in model.graphs() for value in graph.initializers.values())
    return [value.const_value for value in values if isinstance(value.const_value, ir.ExternalTensor)]


def stored_formats(tensors: list[ir.ExternalTensor]) -> dict[str, str]:
    """The number format of every weight by name; scales belong to their weight."""
    return {t.name: FORMATS[t.dtype] for t in sorted(tensors, key=lambda t: t.name) if not t.name.endswith(SCALE)}


def stored_parameters(tensors: list[ir.ExternalTensor]) -> dict[str, int]:
    """Parameters by number format."""
    counts: dict[str, int] = {}
    for tensor in tensors:
        if not tensor.name.endswith(SCALE):
            counts[FORMATS[tensor.dtype]] = counts.get(FORMATS[tensor.dtype], 0) + tensor.size
    return counts
