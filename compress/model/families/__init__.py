"""Model families: a file here is named by its `model_type` and defines one `Architecture`. Files that begin with an underscore
are helpers."""

import importlib
import pkgutil

from compress.model.architecture import Architecture


def names() -> list[str]:
    """The model types that are known."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def get(model_type: str) -> type[Architecture]:
    """The family of one of `names()`."""
    module = importlib.import_module(f"{__name__}.{model_type}")
    defined = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Architecture))
    return next(family for family in defined if family.__module__ == module.__name__)
