"""manifest.json: every file with bytes and sha256, versions, seed, and the stored format of every tensor."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import compress
from compress.disk.files import file_sha256
from compress.disk.locks import LOCK
from compress.disk.partials import JOURNAL
from compress.output_folder.claim import PREVIOUS
from compress.output_folder.integrity import MANIFEST
from compress.output_folder.workspace import CALIBRATION
from compress.strict.json_text import JsonObject

PACKAGES = ("torch", "transformers", "safetensors", "onnx", "onnx-ir", "onnxruntime", "optimum", "numpy")


def versions() -> dict[str, str]:
    """Versions of what decides the bytes and the figures."""
    found = {"compress": compress.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def build(folder: Path, seed: int, formats: dict[str, dict[str, str]]) -> JsonObject:
    """`formats`: artifact -> tensor name -> number format as stored there."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not _passes_away(p.relative_to(folder)))
    files: JsonObject = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in paths
    }
    return {"schema": 1, "versions": versions(), "seed": seed, "files": files, "tensors": formats}


def _passes_away(path: Path) -> bool:
    """The manifest itself, and what is needed only until the output is published."""
    return path.name in (MANIFEST, JOURNAL, LOCK) or path.parts[0] in (CALIBRATION, PREVIOUS)
