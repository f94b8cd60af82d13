"""Files that each bring one class: the file's name is the word the user types.

A file is imported only where its name is used, so that a broken one breaks nothing else.
"""

import importlib
import importlib.util
import inspect
import pkgutil
from abc import ABC
from types import ModuleType
from typing import TypeVar

from compress.errors import InputError, first_line
from compress.strict.plugin import ContractError

T = TypeVar("T", bound=ABC)


def names(package: str) -> list[str]:
    """Module names in `package`; those that begin with an underscore are helpers, sub-packages are shared parts."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(m.name for m in found if not m.ispkg and not m.name.startswith("_"))


def class_in(package: str, name: str, contract: type[T]) -> type[T]:
    """The class that a file brings; raises InputError, which names the file, where it cannot be had."""
    file, module = _file_of(package, name), _load(package, name)
    found: list[type[T]] = [
        value for key, value in vars(module).items() if not key.startswith("_") and _is_brought(value, module, contract)
    ]
    if len(found) != 1:
        had = ", ".join(sorted(value.__name__ for value in found)) or "none"
        raise InputError(f"{file}: expected one class that inherits from {contract.__name__}, found {had}")
    if inspect.isabstract(found[0]):
        lacking = ", ".join(sorted(found[0].__abstractmethods__))
        raise InputError(f"{file}: {found[0].__name__} lacks {lacking}")
    return found[0]


def _load(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(f"{package}.{name}")
    except ContractError as error:
        raise InputError(f"{_file_of(package, name)}: {error}") from None
    except SystemExit:
        raise InputError(f"{_file_of(package, name)}: cannot be loaded (it ends the process)") from None
    except Exception as error:  # whatever stands in that file is run
        why = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"{_file_of(package, name)}: cannot be loaded ({why})") from None


def _file_of(package: str, name: str) -> str:
    spec = importlib.util.find_spec(f"{package}.{name}")
    return f"{package}.{name}" if spec is None or spec.origin is None else spec.origin


def _is_brought(value: object, module: ModuleType, contract: type) -> bool:
    """A class of that file, not one it imports."""
    return inspect.isclass(value) and issubclass(value, contract) and value.__module__ == module.__name__
