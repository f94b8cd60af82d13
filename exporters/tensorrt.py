"""`tensorrt`: a strongly typed graph for TensorRT, and the engine where a builder is installed.

Writes model.onnx, model.onnx.data and the tokenizer's files. `precision` names the type of hidden states; number formats of
weights and inputs come from the passes before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import field_validator

from compress.errors import InputError
from compress.output_folder.onnx_layouts import TENSORRT
from compress.strict.models import Strict
from exporters import Exported, Exporter

if TYPE_CHECKING:  # heavy: importing them takes as long as a command should
    from compress.calibration.ranges import Ranges
    from compress.checkpoint.reader import Checkpoint
    from compress.model.block import Layer
    from compress.model.experts import Experts
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit, Weight
    from compress.runtime.runtimes import Runtime
    from exporters.graph.overflow import Decided

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PRECISIONS = tuple(BYTES)


class Options(Strict):
    """`on_overflow`: what becomes of a layer that fp16 cannot hold.

    `experts`: `dense` runs every expert on every token and reads each matrix once; `gather` reads, for every token, the matrices
    of its own experts. Of E experts a decode step then reads top-k, and a prompt reads top-k for each of its tokens: for engines
    that decode one sequence, or few, and see short prompts.
    """

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    on_overflow: Literal["refuse", "bf16", "fp32"] = "refuse"
    experts: Literal["dense", "gather"] = "dense"

    def idle(self) -> set[str]:
        return set() if self.precision == "fp16" else {"on_overflow"}

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
    _overflow: Decided | None = None

    instead_of_ranges = "precision: bf16 needs none, since it holds what float32 does"

    @property
    def needs_ranges(self) -> bool:
        return self.options.precision == "fp16"

    def fitted(self, checkpoint: Checkpoint, ranges: Ranges) -> Self:
        from exporters.graph import overflow

        fitted = copy.copy(self)
        fitted._overflow = overflow.decided(checkpoint.model, ranges, self.options.on_overflow)
        return fitted

    def refuse(self, model: HybridModel) -> None:
        from exporters.graph import qdq

        for weight in model.weights:
            if (why := qdq.why_not(weight)) is not None:
                raise InputError(f"export.tensorrt: tensor '{weight.name}' {why}")
        if self.options.experts == "gather":
            self._refuse_to_gather(model)

    @staticmethod
    def _refuse_to_gather(model: HybridModel) -> None:
        from exporters.graph import stack

        for layer in model.layers:
            if layer.experts and (why := stack.why_not_gathered(_matrices(model, layer, layer.experts))) is not None:
                raise InputError(
                    f"export.tensorrt: experts: gather takes experts that are stored alike; {why}; use dense"
                )

    def predict_bytes(self, units: Sequence[Unit]) -> int:
        from exporters.graph import artifact

        return artifact.predict_bytes(units, scale_bytes=BYTES[self.options.precision])

    def runtimes(self, model: HybridModel) -> list[Runtime]:
        from compress.runtime.runtimes import of_tensorrt

        return of_tensorrt("tensorrt")

    def export(self, checkpoint: Checkpoint, folder: Path, advance: Callable[[int], None]) -> None:
        """One weight in memory at a time."""
        from compress.checkpoint.writer import copy_companions
        from exporters.dialects.tensorrt import OF_PRECISION, gathering
        from exporters.graph import artifact, wiring
        from exporters.graph.builder import WeightFile

        weights = WeightFile(folder / TENSORRT.data)
        types = self._overflow.types if self._overflow else {}
        dialect = OF_PRECISION[self.options.precision]
        dialect = gathering(dialect) if self.options.experts == "gather" else dialect
        graph = wiring.build(checkpoint.model, dialect, weights, advance, types=types)
        weights.close()
        artifact.save(graph, checkpoint.config, folder / TENSORRT.model, dialect="tensorrt")
        copy_companions(checkpoint.folder, folder)

    def describe(self, folder: Path) -> Exported:
        """Read from model.onnx itself."""
        from exporters.graph import artifact

        return artifact.describe(folder, "tensorrt", TENSORRT)


def _matrices(model: HybridModel, layer: Layer, experts: Experts) -> list[list[Weight]]:
    """Of each expert."""
    weights = model.unit(f"layer.{layer.index}").weights
    return [
        [weights[layer.prefix + experts.prefix(number) + part] for part in experts.parts]
        for number in range(experts.count)
    ]
