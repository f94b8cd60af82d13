"""Number formats for weights. One small file per family; `get(name)` finds the one a recipe names.

Importing this package is cheap; torch is imported with the format itself.
"""

import importlib

# the name in a recipe -> the file that implements it
FILES = {"int8": "int8"}
AS_IT_CAME = "none"


def get(name: str):
    """The format object for a recipe's format name (not `none`)."""
    return importlib.import_module(f"compress.formats.{FILES[name]}").FORMATS[name]
