"""Model families: a file here is named by its `model_type` and defines one `Architecture`. Files that begin with an underscore
are helpers."""

from compress.model.architecture import Architecture
from compress.strict import plugin_files


def names() -> list[str]:
    """The model types that are known."""
    return plugin_files.names(__name__)


def get(model_type: str) -> type[Architecture]:
    """The family of one of `names()`; raises InputError, which names its file, where that is no family."""
    return plugin_files.class_in(__name__, model_type, Architecture)  # type: ignore[type-abstract]  # what is returned is not
