"""Passes and exporters by the names that users type. This is the one module that knows where exporters are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from compress.passes import Pass
from compress.strict.models import Strict
from compress.strict.plugin_files import class_in, names
from exporters import Exported, Exporter

if TYPE_CHECKING:
    import onnx_ir as ir

    from compress.model.architecture import Architecture
    from compress.model.hybrid import HybridModel

__all__ = ["Exported", "Exporter", "Pass", "graph_reading", "load_exporter", "load_pass", "names"]
PASSES, EXPORTERS = "compress.passes", "exporters"


def load_pass(name: str) -> type[Pass[Strict]]:
    return class_in(PASSES, name, Pass)  # type: ignore[type-abstract]  # what is returned is not abstract


def load_exporter(name: str) -> type[Exporter[Strict]]:
    return class_in(EXPORTERS, name, Exporter)  # type: ignore[type-abstract]  # what is returned is not abstract


class GraphReading(Protocol):
    """What reads an exported graph back: `exporters.graph.reading`."""

    def load(self, path: Path) -> ir.Model: ...

    def architecture(self, model: ir.Model, path: Path) -> Architecture: ...

    def hybrid(self, model: ir.Model, path: Path) -> HybridModel: ...

    def external_tensors(self, model: ir.Model) -> list[ir.ExternalTensor]: ...

    def stored_parameters(self, tensors: list[ir.ExternalTensor]) -> dict[str, int]: ...


def graph_reading() -> GraphReading:
    from exporters.graph import reading

    return reading
