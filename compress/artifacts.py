"""What an ARTIFACT argument means: an output folder of `apply`, one of its subfolders, a checkpoint, or a model.onnx."""

from pathlib import Path

from compress.errors import InputError
from compress.workspace import MANIFEST

PREFERRED = ("onnxruntime", "onnx", "checkpoint")  # of an output folder: the first that is there


def find_artifact(path: Path) -> Path:
    """The model.onnx, or the checkpoint folder, that `path` means."""
    if path.is_file():
        if path.suffix != ".onnx":
            raise InputError(f"{path}: expected a folder or a model.onnx")
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    if (path / MANIFEST).is_file():
        path = next((path / name for name in PREFERRED if (path / name).is_dir()), path)
    if (path / "model.onnx").is_file():
        return path / "model.onnx"
    if (path / "config.json").is_file():
        return path
    raise InputError(f"{path}: neither an output of apply, nor a checkpoint folder, nor a folder with a model.onnx")
