"""Finds a builder of engines and loads it: `tensorrt` where that is installed, else TensorRT-RTX, which builds without a GPU.

TensorRT-RTX comes as two packages that know nothing of each other: the Python binding, and a provider for onnxruntime that
bundles the libraries. They are loaded from there by path, so nothing need be on LD_LIBRARY_PATH.
"""

import ctypes
import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HOW_TO_BUILD = "pip install 'compress-hybrid-llm[tensorrt-rtx]' brings a builder that needs no GPU; then export the checkpoint again"
FULL, BINDING, BUNDLE = "tensorrt", "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
LIBRARIES = ("libcudart", "libtensorrt_rtx", "libtensorrt_onnxparser_rtx")  # in the order they need each other
SHARED_OBJECT = re.compile(r"(?P<name>.+)\.so(?:\.(?P<version>[\d.]+))?")


class UnusableError(Exception):
    """A builder does not work here; a clause says why."""


class Builder(NamedTuple):
    name: str
    version: str
    module: ModuleType


def why_missing() -> str | None:
    """Why there can be no builder, as far as it shows without loading anything; None where there may be one."""
    if _is_installed(FULL) or (_is_installed(BINDING) and _is_installed(BUNDLE)):
        return None
    if _is_installed(BINDING):
        return f"{BINDING} is installed without {BUNDLE}, which has the libraries it needs; {HOW_TO_BUILD}"
    if _is_installed(BUNDLE):
        return f"{BUNDLE} is installed without {BINDING}, through which Python calls it; {HOW_TO_BUILD}"
    return f"no builder is installed; {HOW_TO_BUILD}"


def load() -> Builder:
    """The first that works: TensorRT itself makes no builder where it finds no GPU. Raises UnusableError, with a sentence.

    Not for our own process: libraries that fit badly end it."""
    if (missing := why_missing()) is not None:
        raise UnusableError(missing)
    why_not: list[str] = []
    for is_there, loaded in ((_is_installed(FULL), _full), (_is_installed(BINDING) and _is_installed(BUNDLE), _rtx)):
        if is_there:
            try:
                return _working(loaded())
            except UnusableError as error:
                why_not.append(str(error))
    raise UnusableError(f"{', and '.join(why_not)}; {HOW_TO_BUILD}")


def _is_installed(package: str) -> bool:
    """As a package with something in it: a folder of that name in the working folder is none."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.origin is not None


def _imported(module: str) -> tuple[str, ModuleType]:
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # a library that is missing or of another version shows in several ways
        raise UnusableError(f"{module} cannot be loaded ({str(error).splitlines()[0]})") from None
    return str(imported.__version__), imported


def _full() -> Builder:
    return Builder("TensorRT", *_imported(FULL))


def _rtx() -> Builder:
    libraries = bundled(_folder(BUNDLE))
    for library in libraries.values():
        try:
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise UnusableError(f"{library.name} of {BUNDLE} cannot be loaded ({error})") from None
    version, module = _imported(BINDING)
    refuse_mismatch(version, libraries["libtensorrt_rtx"])
    return Builder("TensorRT-RTX", version, module)


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None, package
    return Path(spec.origin).parent


def bundled(folder: Path) -> dict[str, Path]:
    """The libraries a builder needs, in the order they are loaded. Raises UnusableError where one is missing."""
    found = {match["name"]: path for path in sorted(folder.iterdir()) if (match := SHARED_OBJECT.fullmatch(path.name))}
    if missing := [name for name in LIBRARIES if name not in found]:
        raise UnusableError(f"{BUNDLE} has no {missing[0]}.so")
    return {name: found[name] for name in LIBRARIES}


def refuse_mismatch(binding: str, library: Path) -> None:
    """A binding of another version than the library calls what is not there."""
    match = SHARED_OBJECT.fullmatch(library.name)
    version = (match["version"] if match else None) or ""
    if version and not f"{binding}.".startswith(f"{version}."):
        raise UnusableError(f"{BINDING} is version {binding}, but the libraries of {BUNDLE} are {version}")


def _working(builder: Builder) -> Builder:
    trt = builder.module
    try:
        trt.Builder(trt.Logger(trt.Logger.ERROR))
    except Exception as error:  # pybind's TypeError where the library gives none
        raise UnusableError(
            f"{builder.name} {builder.version} makes no builder here, which may need a GPU "
            f"({str(error).splitlines()[0]})"
        ) from None
    return builder
