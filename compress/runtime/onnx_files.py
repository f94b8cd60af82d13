"""Opens a model.onnx whose weights are links, or whose folder has a name that is not text.

onnxruntime reads weights only from below the model's own folder, links followed, or from a hub cache: a hostile graph
cannot name any file. But a link beside the model was put there by whoever made the folder, on another disk perhaps. So the
graph is handed over in memory, naming the files that the links lead to.
"""

import os
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from compress.disk.paths import is_text, with_text_name
from compress.disk.pointers import refuse_pointer
from compress.output_folder.onnx_layouts import data_files

FOLDER_KEY = "session.model_external_initializers_file_folder_path"


def open_session(path: Path, settings: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the CPU. Raises InputError for a git-lfs pointer, and what onnxruntime raises."""
    for file in (path, *data_files(path)):
        refuse_pointer(file)
    provider = ["CPUExecutionProvider"]
    if is_text(path) and not any(file.is_symlink() for file in path.parent.iterdir()):
        return ort.InferenceSession(path, settings, providers=provider)
    graph, folder = _with_followed_links(path)
    with with_text_name(folder) as named:
        settings.add_session_config_entry(FOLDER_KEY, str(named))
        return ort.InferenceSession(graph, settings, providers=provider)


def _with_followed_links(path: Path) -> tuple[bytes, Path]:
    """The graph, its weights' places being relative to the folder that is returned. Only names beside the model are followed."""
    model = ir.load(path)
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    stored = [(v, v.const_value) for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    beside = {name for name in {str(tensor.location) for _, tensor in stored} if Path(name).name == name}
    real = {name: (path.parent / name).resolve() for name in beside}
    folder = Path(os.path.commonpath([file.parent for file in real.values()])) if real else path.parent.absolute()
    for value, tensor in stored:
        if tensor.location in real:
            value.const_value = _moved(tensor, real[str(tensor.location)].relative_to(folder))
    return ir.to_proto(model).SerializeToString(), folder


def _moved(tensor: ir.ExternalTensor, location: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        str(location), tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
    )
