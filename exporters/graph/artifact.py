"""An ONNX artifact on disk: saved with the model's configuration in its metadata, checked, and described from its file."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

import compress
from compress import formats
from compress.checkpoint.companions import without_code
from compress.disk.paths import with_text_name
from compress.model.roles import Role
from compress.model.weight import Unit, Weight
from compress.output_folder.onnx_layouts import GENAI, Layout
from compress.runtime.graph_names import DIALECT_KEY
from compress.runtime.state_support import why_not_genai
from compress.strict.json_text import JsonObject
from exporters import Exported
from exporters.graph import reading

IR_VERSION = 10  # the one that came with opset 21


def save(graph: ir.Graph, config_json: JsonObject, path: Path, dialect: str | None = None) -> None:
    """Writes model.onnx beside its weights, with the checkpoint's config.json in its metadata, and has it checked; `dialect`
    names one that is not for onnxruntime."""
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="compress", producer_version=compress.__version__)
    model.metadata_props[reading.CONFIG_KEY] = json.dumps(without_code(config_json), sort_keys=True)
    if dialect is not None:
        model.metadata_props[DIALECT_KEY] = dialect
    ir.save(model, path)
    with with_text_name(path.parent) as named:
        onnx.checker.check_model(named / path.name, full_check=True)


def describe(folder: Path, kind: str, layout: Layout) -> Exported:
    """What an exported folder holds, read from model.onnx itself."""
    graph = reading.load(folder / layout.model)
    tensors = reading.external_tensors(graph)
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    names = [layout.model, layout.data, layout.config]
    files = tuple(name for name in names if (folder / name).is_file())
    return Exported(
        kind, layout.model, files, weight_bytes, reading.stored_formats(tensors), _notes(graph, folder, layout)
    )


def _notes(graph: ir.Model, folder: Path, layout: Layout) -> tuple[str, ...]:
    """Why a file is not there."""
    if layout != GENAI:
        return ()
    why = why_not_genai(reading.architecture(graph, folder / layout.model).layers)
    return () if why is None else (f"no {GENAI.config}: onnxruntime-genai does not run it, since {why}",)


def predict_bytes(units: Iterable[Unit], scale_bytes: int | None = None) -> int:
    """Bytes of weights, before any is read; `scale_bytes` where all scales are of one type."""
    weights = (weight for unit in units for weight in unit.weights.values())
    return sum(
        _predict_bytes(weight, scale_bytes) for weight in weights if weight.role != Role.MTP
    )  # no graph has those


def engine_bytes(unit: Unit, width: int) -> int:
    """Of the same in an engine, where numbers that are not quantized are as wide as hidden states, or as they are stored."""
    plain = (w for w in unit.weights.values() if not w.is_quantized and w.role != Role.MTP)
    return predict_bytes((unit,), width) + sum(max(0, width * w.parameters - w.stored_bytes()) for w in plain)


def _predict_bytes(weight: Weight, scale_bytes: int | None) -> int:
    """A weight in its own format; a narrow scale in a byte (it takes two in the few matrices where a byte is too few)."""
    if not weight.is_quantized:
        return weight.stored_bytes()
    number_format = formats.get(weight.format)
    parts = number_format.layout(weight.shape, packed=False)
    values: int = sum(part.bytes for suffix, part in parts.items() if suffix in ("weight", "weight_packed"))
    if scale_bytes is None:
        scale_bytes = 1 if number_format.is_narrow else number_format.scale_dtype.itemsize
    scales: int = math.prod(number_format.scales_shape(weight.shape))
    return values + scale_bytes * scales
