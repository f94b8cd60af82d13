"""`tensorrt`: a strongly typed graph for TensorRT, and the engine where a builder is installed.

Writes model.onnx, model.onnx.data and the tokenizer's files. `precision` names the type of hidden states; number formats of
weights and inputs come from the passes before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from compress.errors import InputError
from compress.output_folder.onnx_layouts import TENSORRT
from compress.strict.models import Strict
from exporters import Exported, Exporter

if TYPE_CHECKING:  # heavy: importing them takes as long as a command should
    from compress.checkpoint.reader import Checkpoint
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit
    from compress.runtime.runtimes import Runtime

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PRECISIONS = tuple(BYTES)


class Options(Strict):
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"

    @field_validator("precision", mode="before")
    @classmethod
    def _is_no_weight_format(cls, value: object) -> object:
        if isinstance(value, str) and value not in PRECISIONS and value.startswith(("fp8", "int8", "int4")):
            raise ValueError(
                f"precision names the type of hidden states, one of {', '.join(PRECISIONS)}; {value} layers are made "
                "by a pass before the export, such as quantize"
            )
        return value


class TensorRT(Exporter[Options]):
    def refuse(self, model: HybridModel) -> None:
        from exporters.graph import qdq

        for weight in model.weights:
            if (why := qdq.why_not(weight)) is not None:
                raise InputError(f"export.tensorrt: tensor '{weight.name}' {why}")

    def predict_bytes(self, units: Sequence[Unit]) -> int:
        from exporters.graph import artifact

        return artifact.predict_bytes(units, scale_bytes=BYTES[self.options.precision])

    def runtimes(self, model: HybridModel) -> list[Runtime]:
        from compress.runtime.runtimes import of_tensorrt

        return of_tensorrt("tensorrt")

    def export(self, checkpoint: Checkpoint, folder: Path, advance: Callable[[int], None]) -> None:
        """One weight in memory at a time."""
        from compress.checkpoint.writer import copy_companions
        from exporters.dialects.tensorrt import OF_PRECISION
        from exporters.graph import artifact, wiring
        from exporters.graph.builder import WeightFile

        weights = WeightFile(folder / TENSORRT.data)
        graph = wiring.build(checkpoint.model, OF_PRECISION[self.options.precision], weights, advance)
        weights.close()
        artifact.save(graph, checkpoint.config, folder / TENSORRT.model)
        copy_companions(checkpoint.folder, folder)

    def describe(self, folder: Path) -> Exported:
        """Read from model.onnx itself."""
        from exporters.graph import artifact

        return artifact.describe(folder, "tensorrt", TENSORRT)
