"""`tensorrt`: a strongly typed graph for TensorRT, and the engine where a builder is installed.

Writes model.onnx, model.onnx.data, build.json and the tokenizer's files, and model.engine with the builder's build.log.
`precision` names the type of hidden states; number formats of weights and inputs come from the passes before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.errors import InputError
from compress.output_folder.onnx_layouts import TENSORRT
from compress.strict.models import Strict, WholeNumber
from exporters import Exported, Exporter
from exporters.engines import ENGINE

if TYPE_CHECKING:  # heavy: importing them takes as long as a command should
    import onnx_ir as ir

    from compress.calibration.ranges import Ranges
    from compress.checkpoint.reader import Checkpoint
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit
    from compress.output_folder.build_facts import BuildFacts
    from compress.runtime.runtimes import Runtime
    from exporters.graph.overflow import Decided

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PRECISIONS = tuple(BYTES)
MOST_TOKENS = 1 << 30  # TensorRT counts the elements of a shape in 32 bits


class Options(Strict):
    """`on_overflow`: what becomes of a layer that fp16 cannot hold.

    `experts`: `dense` runs every expert on every token and reads each matrix once. `gather` copies, for every token, the matrices
    of its own experts, widened: a decode step reads top-k of E experts, and a prompt of `prefill_length` tokens takes memory for
    top-k experts times as many. For engines that decode one sequence, or few, and read prompts in pieces of some ten tokens.
    """

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    on_overflow: Literal["refuse", "bf16", "fp32"] = "refuse"
    experts: Literal["dense", "gather"] = "dense"
    build: Literal["auto", "required", "never"] = "auto"
    batch: WholeNumber = Field(default=1, ge=1, le=MOST_TOKENS)  # sequences, at most
    prefill_length: WholeNumber = Field(default=512, ge=1, le=MOST_TOKENS)  # tokens that come at once, at most
    context: WholeNumber = Field(default=4096, ge=1, le=MOST_TOKENS)  # tokens of a sequence, at most

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

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prefill_length > self.context:
            raise ValueError(
                f"prefill_length is {self.prefill_length}, more than the {self.context} tokens of context that it is part of"
            )
        return self


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
        from exporters.graph import qdq, stack

        for weight in model.weights:
            if (why := qdq.why_not(weight)) is not None:
                raise InputError(f"export.tensorrt: tensor '{weight.name}' {why}")
        if self.options.experts == "gather" and (why := stack.why_not_gathered(model)) is not None:
            raise InputError(f"export.tensorrt: experts: gather takes experts that are stored alike; {why}; use dense")
        if self.options.build == "required" and (why := self._why_no_engine()) is not None:
            raise InputError(f"export.tensorrt: build is required, but {why}")

    def plans(self, model: HybridModel) -> list[str]:
        """Whether there will be an engine."""
        from exporters.engines import process

        if (why := self._why_no_engine()) is not None:
            return [f"no {ENGINE}: {why}"]
        builder = process.found()
        sizes = f"batch {self.options.batch}, prompts of {self.options.prefill_length} tokens, context {self.options.context}"
        return [f"{ENGINE} with {builder['name']} {builder['version']}: {sizes}"]

    def _why_no_engine(self) -> str | None:
        from exporters.engines import process

        return "build: never" if self.options.build == "never" else process.why_none()

    def predict_bytes(self, units: Sequence[Unit]) -> int:
        from exporters.graph import artifact

        return artifact.predict_bytes(units, scale_bytes=BYTES[self.options.precision])

    def runtimes(self, model: HybridModel) -> list[Runtime]:
        from compress.runtime.runtimes import of_tensorrt

        return of_tensorrt("tensorrt")

    def export(self, checkpoint: Checkpoint, folder: Path, advance: Callable[[int], None]) -> None:
        """One weight in memory at a time; the builder holds what it holds in a process of its own."""
        from compress.checkpoint.writer import copy_companions
        from compress.disk.json_files import write_json
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
        write_json(folder / TENSORRT.config, self._build(checkpoint.model, folder))

    def _build(self, model: HybridModel, folder: Path) -> BuildFacts:
        from compress.model.roles import Role
        from compress.runtime import twin
        from exporters.engines import build, profiles
        from exporters.graph import reading

        graph = reading.load(folder / TENSORRT.model)
        wanted = build.Wanted(
            folder / TENSORRT.model,
            self.options.precision,
            "twin" if twin.is_needed(graph) else "file",
            profiles.of(
                _shapes(graph.graph), **self.options.model_dump(include={"batch", "prefill_length", "context"})
            ),
            {weight.name: weight.format for weight in model.weights if weight.role != Role.MTP},
            self._engine_bytes(model),
            self._overflow.facts if self._overflow else None,
        )
        if (why := self._why_no_engine()) is not None:
            return build.without_engine(wanted, why)
        return build.build(wanted, graph.graph)

    def _engine_bytes(self, model: HybridModel) -> int:
        """Of weights in an engine, by arithmetic: scales, and what has none, have the type of hidden states of their layer."""
        from exporters.graph import artifact

        types = self._overflow.types if self._overflow else {}
        widths = {unit.name: BYTES[self.options.precision] for unit in model.units}
        widths |= {name: int(dtype.itemsize) for name, dtype in types.items()}
        return sum(artifact.engine_bytes(unit, widths[unit.name]) for unit in model.units)

    def describe(self, folder: Path) -> Exported:
        """Read from model.onnx itself, and from build.json."""
        from compress.output_folder import build_facts, overflow_facts
        from exporters.graph import artifact

        exported, facts = artifact.describe(folder, "tensorrt", TENSORRT), build_facts.read(folder / TENSORRT.config)
        written = () if facts["engine"] is None else (facts["engine"],)
        said = () if facts["overflow"] is None else (overflow_facts.sentence(facts["overflow"]),)
        return replace(exported, files=(*exported.files, *written), notes=exported.notes + said, build=facts)


def _shapes(graph: ir.Graph) -> dict[str, list[int | str]]:
    """Of inputs, with the names of dimensions."""
    shapes = {str(given.name): given.shape or () for given in graph.inputs}
    return {name: [size if isinstance(size, int) else str(size) for size in shape] for name, shape in shapes.items()}
