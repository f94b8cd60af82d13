"""Finds passes and exporters by file name: the file's name is the word the user types.

A file is imported only where its name is used, so that a broken one breaks nothing else. This is the one module that knows
where exporters are.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeVar

from compress.errors import InputError, first_line
from compress.passes import Pass
from compress.strict.models import Strict
from compress.strict.plugin import ContractError, Plugin
from exporters import Exported, Exporter

if TYPE_CHECKING:
    import onnx_ir as ir

    from compress.model.architecture import Architecture

__all__ = ["Exported", "Exporter", "Pass", "graph_reading", "load", "load_exporter", "load_pass", "names"]
PASSES, EXPORTERS = "compress.passes", "exporters"
ContractT = TypeVar("ContractT", bound=Plugin[Strict])


def names(package: str) -> list[str]:
    """Module names in `package`; those that begin with an underscore are helpers, sub-packages are shared parts."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")


def load_pass(name: str) -> type[Pass[Strict]]:
    return _class_in(PASSES, name, Pass)  # type: ignore[type-abstract]  # what is returned is not abstract


def load_exporter(name: str) -> type[Exporter[Strict]]:
    return _class_in(EXPORTERS, name, Exporter)  # type: ignore[type-abstract]  # what is returned is not abstract


class GraphReading(Protocol):
    """What reads an exported graph back: `exporters.graph.reading`."""

    def load(self, path: Path) -> ir.Model: ...

    def architecture(self, model: ir.Model, path: Path) -> Architecture: ...

    def external_tensors(self, model: ir.Model) -> list[ir.ExternalTensor]: ...

    def stored_parameters(self, tensors: list[ir.ExternalTensor]) -> dict[str, int]: ...


def graph_reading() -> GraphReading:
    from exporters.graph import reading

    return reading


def _class_in(package: str, name: str, contract: type[ContractT]) -> type[ContractT]:
    """The class that a file brings; raises InputError, which names the file, where it cannot be had."""
    file = _file_of(package, name)
    try:
        module = load(package, name)
    except ContractError as error:
        raise InputError(f"{file}: {error}") from None
    except SystemExit:
        raise InputError(f"{file}: cannot be loaded (it ends the process)") from None
    except Exception as error:  # whatever stands in that file is run
        raise InputError(f"{file}: cannot be loaded ({type(error).__name__}: {first_line(error)})") from None
    found = [
        value for key, value in vars(module).items() if not key.startswith("_") and _is_brought(value, module, contract)
    ]
    if len(found) != 1:
        had = ", ".join(sorted(value.__name__ for value in found)) or "none"
        raise InputError(f"{file}: expected one class that inherits from {contract.__name__}, found {had}")
    if missing := sorted(found[0].__abstractmethods__):
        raise InputError(f"{file}: {found[0].__name__} lacks {', '.join(missing)}")
    only: type[ContractT] = found[0]
    return only


def _file_of(package: str, name: str) -> str:
    spec = importlib.util.find_spec(f"{package}.{name}")
    return f"{package}.{name}" if spec is None or spec.origin is None else spec.origin


def _is_brought(value: object, module: ModuleType, contract: type) -> bool:
    """A class of that file, not one it imports."""
    return inspect.isclass(value) and issubclass(value, contract) and value.__module__ == module.__name__
