"""`onnx`: one portable graph for prefill and decode, in standard operators of opset 21, beside its weights.

Writes model.onnx, model.onnx.data, genai_config.json (onnxruntime-genai, type `decoder`) and the tokenizer's files; with
`layout: transformers.js` onnx/model.onnx, onnx/model.onnx_data, config.json and the tokenizer's files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress import formats, plugins
from compress.runtime import onnx_layouts
from compress.runtime.onnx_layouts import GENAI, TRANSFORMERS_JS
from compress.strict.models import Strict
from exporters import Exported, Exporter

if TYPE_CHECKING:
    from compress.checkpoint.reader import Checkpoint
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit, Weight
    from compress.runtime.runtimes import Runtime

LAYOUTS = {"genai": GENAI, "transformers.js": TRANSFORMERS_JS}
IR_VERSION = 10  # the one that came with opset 21


class Options(Strict):
    opset: Literal[21] = 21
    layout: Literal["genai", "transformers.js"] = "genai"


class Onnx(Exporter[Options]):
    """The portable graph."""

    def predict_bytes(self, units: Sequence[Unit]) -> int:
        return sum(_predict_bytes(weight) for unit in units for weight in unit.weights.values())

    def runtimes(self, model: HybridModel) -> list[Runtime]:
        from compress.runtime.runtimes import of_onnx

        return of_onnx(model, "onnx", self.options.layout)

    def export(self, checkpoint: Checkpoint, folder: Path, advance: Callable[[int], None]) -> None:
        """Writes the artifact of an opened checkpoint into an empty folder, one weight in memory at a time."""
        import onnx
        import onnx_ir as ir

        import compress
        from compress.checkpoint.companions import without_code
        from compress.checkpoint.writer import copy_companions, write_json
        from compress.disk.paths import with_text_name
        from exporters.graph import genai, reading, transformers_js
        from exporters.graph.builder import Graph, WeightFile

        layout = LAYOUTS[self.options.layout]
        path = folder / layout.model
        path.parent.mkdir(exist_ok=True)
        weights = WeightFile(folder / layout.data)
        architecture = plugins.load("exporters.architectures", checkpoint.config["model_type"])
        graph = architecture.build(checkpoint.model, Graph(weights, self.options.opset), advance)
        weights.close()
        if layout is TRANSFORMERS_JS:
            transformers_js.rename_states(graph)
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="compress", producer_version=compress.__version__)
        model.metadata_props[reading.CONFIG_KEY] = json.dumps(without_code(checkpoint.config), sort_keys=True)
        ir.save(model, path)
        with with_text_name(path.parent) as named:
            onnx.checker.check_model(named / path.name, full_check=True)
        copy_companions(checkpoint.folder, folder)
        configuration = transformers_js.config if layout is TRANSFORMERS_JS else genai.config
        write_json(folder / layout.config, configuration(checkpoint))

    def describe(self, folder: Path) -> Exported:
        """Read from model.onnx itself."""
        from exporters.graph import reading

        layout = onnx_layouts.of(folder)
        tensors = reading.external_tensors(reading.load(folder / layout.model))
        weight_bytes = sum(tensor.length for tensor in tensors)
        files = (layout.model, layout.data, layout.config)
        return Exported("onnx", layout.model, files, weight_bytes, reading.stored_formats(tensors))


def _predict_bytes(weight: Weight) -> int:
    """A weight in its own format; a narrow scale in a byte (it takes two in the few matrices where a byte is too few)."""
    if not weight.is_quantized:
        return weight.stored_bytes()
    number_format = formats.get(weight.format)
    parts = number_format.layout(weight.shape, packed=False)
    values = sum(part.bytes for suffix, part in parts.items() if suffix in ("weight", "weight_packed"))
    scale_bytes = 1 if number_format.is_narrow else number_format.scale_dtype.itemsize
    return values + scale_bytes * math.prod(number_format.scales_shape(weight.shape))
