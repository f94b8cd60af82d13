"""`onnx`: one portable graph for prefill and decode, in standard operators of opset 21, beside its weights.

Writes model.onnx, model.onnx.data, genai_config.json (onnxruntime-genai, type `decoder`;
not where layers keep states of one name differently) and the tokenizer's files; with
`layout: transformers.js` onnx/model.onnx, onnx/model.onnx_data, config.json and the tokenizer's files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress.output_folder import onnx_layouts
from compress.output_folder.onnx_layouts import GENAI, TRANSFORMERS_JS
from compress.strict.models import Strict
from exporters import Exported, Exporter

if TYPE_CHECKING:  # heavy: importing them takes as long as a command should
    from compress.checkpoint.reader import Checkpoint
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit
    from compress.runtime.runtimes import Runtime

LAYOUTS = {"genai": GENAI, "transformers.js": TRANSFORMERS_JS}


class Options(Strict):
    opset: Literal[21] = 21
    layout: Literal["genai", "transformers.js"] = "genai"


class Onnx(Exporter[Options]):
    def predict_bytes(self, units: Sequence[Unit]) -> int:
        from exporters.graph import artifact

        return artifact.predict_bytes(units)

    def runtimes(self, model: HybridModel) -> list[Runtime]:
        from compress.runtime.runtimes import of_onnx

        return of_onnx(model, "onnx", self.options.layout)

    def export(self, checkpoint: Checkpoint, folder: Path, advance: Callable[[int], None]) -> None:
        """One weight in memory at a time."""
        from compress.checkpoint.writer import copy_companions
        from compress.disk.json_files import write_json
        from compress.runtime.state_support import why_not_genai
        from exporters.dialects.portable import Portable
        from exporters.graph import artifact, genai, transformers_js, wiring
        from exporters.graph.builder import WeightFile

        layout = LAYOUTS[self.options.layout]
        is_js = layout is TRANSFORMERS_JS
        (folder / layout.model).parent.mkdir(exist_ok=True)
        weights = WeightFile(folder / layout.data)
        graph = wiring.build(checkpoint.model, Portable, weights, advance)
        weights.close()
        if is_js:
            transformers_js.rename_states(graph)
        artifact.save(graph, checkpoint.config, folder / layout.model)
        copy_companions(checkpoint.folder, folder)
        if is_js or why_not_genai(checkpoint.model.layers) is None:
            write_json(folder / layout.config, (transformers_js if is_js else genai).config(checkpoint))

    def describe(self, folder: Path) -> Exported:
        """Read from model.onnx itself."""
        from exporters.graph import artifact

        return artifact.describe(folder, "onnx", onnx_layouts.of(folder) or GENAI)
