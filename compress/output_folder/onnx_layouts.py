"""Where the files of an ONNX artifact lie, for onnxruntime-genai and for Transformers.js.

genai             model.onnx, model.onnx.data, tokenizer and configuration beside them
tensorrt          the same, with what was built of it in build.json
transformers.js   onnx/model.onnx, onnx/model.onnx_data, tokenizer and configuration one folder up
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Paths within the artifact's folder. `config` is the runtime's own configuration."""

    model: str
    data: str
    config: str


GENAI = Layout("model.onnx", "model.onnx.data", "genai_config.json")
TENSORRT = Layout("model.onnx", "model.onnx.data", "build.json")
TRANSFORMERS_JS = Layout("onnx/model.onnx", "onnx/model.onnx_data", "config.json")


def of(folder: Path) -> Layout | None:
    """The layout of an artifact's folder. In the second one the weights tell it from a folder with an export in it."""
    if (folder / GENAI.model).is_file():
        return GENAI
    is_js = all((folder / name).is_file() for name in (TRANSFORMERS_JS.model, TRANSFORMERS_JS.data))
    return TRANSFORMERS_JS if is_js else None


def find(folder: Path) -> Path | None:
    """The graph of an artifact's folder, in either layout."""
    layout = of(folder)
    return folder / layout.model if layout else None


def data_files(model: Path) -> tuple[Path, Path]:
    """Where the weights of a graph may lie."""
    return model.with_name(f"{model.name}.data"), model.with_name(f"{model.name}_data")


def folder_of(artifact: Path) -> Path:
    """The folder with the tokenizer of a graph, or of a checkpoint, which is that folder."""
    if artifact.is_dir():
        return artifact
    folder = artifact.parent
    return folder.parent if find(folder.parent) == artifact else folder
