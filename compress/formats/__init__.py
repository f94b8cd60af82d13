"""Number formats for weights. One small file per family; `get(name)` finds the one a recipe names.

Importing this package is cheap; torch is imported with the format itself.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compress.formats.base import NumberFormat

# the name in a recipe -> the file that implements it
FILES = {
    **dict.fromkeys(("int8", "int8-tensor", "int8-g32", "int8-g16"), "int8"),
    **dict.fromkeys(("int4-g32", "int4-g64", "int4-g128", "int4-g16"), "int4"),
    **dict.fromkeys(("fp8-e4m3", "fp8-e4m3-tensor", "fp8-e4m3-b128"), "fp8"),
}
PLAIN = ("bf16", "fp16", "fp32")  # stored as they are, without scales
AS_IT_CAME = "none"
NAMES = (*FILES, *PLAIN, AS_IT_CAME)


def get(name: str) -> "NumberFormat":
    """The format object for a quantized format's name (neither plain nor `none`)."""
    formats: dict[str, NumberFormat] = importlib.import_module(f"compress.formats.{FILES[name]}").FORMATS
    return formats[name]


def fitting(name: str, shape: tuple[int, ...]) -> str:
    """The format itself, or what stands in for it where its groups do not divide K: smaller groups, else int8."""
    if name not in FILES or get(name).applies_to(shape):
        return name
    family, _, size = name.partition("-g")
    smaller = [f"{family}-g{s}" for s in (64, 32, 16) if s < int(size) and f"{family}-g{s}" in FILES]
    return next((candidate for candidate in smaller if get(candidate).applies_to(shape)), "int8")
