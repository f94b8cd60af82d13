"""Finds passes, exporters and architectures by file name: the file's name is the word the user types."""

import importlib
import pkgutil
from types import ModuleType

PASSES, EXPORTERS, ARCHITECTURES = "compress.passes", "exporters", "compress.model.families"


def names(package: str) -> list[str]:
    """Module names in `package`; those that begin with an underscore are helpers, sub-packages are shared parts."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_"))


def load(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")
