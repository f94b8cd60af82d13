"""Where the files of an ONNX artifact lie, and what its inputs, outputs and their dimensions are called, for onnxruntime-genai
and for Transformers.js.

genai             model.onnx, model.onnx.data, tokenizer and configuration beside them
transformers.js   onnx/model.onnx, onnx/model.onnx_data, tokenizer and configuration one folder up

genai             past_key_values.N.key  .value  .conv_state  .recurrent_state   ->  present.N. ...
transformers.js   past_key_values.N.key  .value  past_conv.N  past_ssm.N         ->  present.N. ...  present_conv.N ...
"""

from dataclasses import dataclass
from pathlib import Path

from compress.model.states import StateSpec


@dataclass(frozen=True)
class Layout:
    """Paths within the artifact's folder. `config` is the runtime's own configuration."""

    model: str
    data: str
    config: str


GENAI = Layout("model.onnx", "model.onnx.data", "genai_config.json")
TRANSFORMERS_JS = Layout("onnx/model.onnx", "onnx/model.onnx_data", "config.json")
BATCH, SEQUENCE, PAST, TOTAL = DIMENSIONS = (
    "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length",
)  # fmt: skip
JS = {"conv_state": "conv", "recurrent_state": "ssm"}
KINDS = {short: kind for kind, short in JS.items()}


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


def past_of(index: int, spec: StateSpec) -> str:
    """The input that a state of a layer comes in by."""
    return f"past_key_values.{index}.{spec.name}"


def dimensions(spec: StateSpec, length: str) -> tuple[int | str, ...]:
    """A state's shape; `length` names the dimension that grows."""
    return (BATCH, *(length if axis == spec.grows else size for axis, size in enumerate(spec.shape)))


def is_past(name: str) -> bool:
    return name.startswith("past_")


def present_of(past: str) -> str:
    """The output that is fed back as this input."""
    return past.replace("past_key_values", "present").replace("past_", "present_")


def kind_of(past: str) -> str:
    """key, value, conv_state or recurrent_state."""
    first, _, last = past.partition(".")
    return KINDS.get(first.removeprefix("past_")) or last.rpartition(".")[2]


def in_transformers_js(name: str) -> str:
    """An input's or output's name in that layout, from the one in genai's."""
    first, _, rest = name.partition(".")
    index, _, kind = rest.partition(".")
    return f"{first.partition('_')[0]}_{JS[kind]}.{index}" if kind in JS else name
