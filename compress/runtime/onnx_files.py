"""Opens a model.onnx. One that onnxruntime cannot run as it lies there is handed over in memory: whose weights are links, whose
folder has a name that is not text, or that computes in bf16.

onnxruntime reads weights only from below the model's own folder, links followed, or from a hub cache: a hostile graph
cannot name any file. But a link beside the model was put there by whoever made the folder, on another disk perhaps. So the
graph that is handed over names the files that the links lead to.
"""

import os
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from compress import plugins
from compress.disk.paths import is_text, with_text_name
from compress.disk.pointers import refuse_pointer
from compress.output_folder.onnx_layouts import data_files
from compress.runtime import memory, twin
from compress.runtime.graph_names import DIALECT_KEY

FOLDER_KEY = "session.model_external_initializers_file_folder_path"
# A graph of a dialect for others is to compute what they would: onnxruntime would make unsigned products of quantized inputs,
# whose sums saturate on some processors, and round the inputs of products with quantized weights to 8 bits.
AS_WRITTEN = ("session.disable_quant_qdq", "1")
# So weights are widened when the graph is loaded: peak memory over their size in float32 was 1.2 times that, whatever their format.
FLOAT_BYTES = 4
WIDENED_FACTOR = 1.3


def open_session(path: Path, settings: ort.SessionOptions) -> ort.InferenceSession:
    """A session on the CPU. Raises InputError for a git-lfs pointer, for what is no ONNX model or needs more memory than there is, and what
    onnxruntime raises."""
    for file in data_files(path):
        refuse_pointer(file)
    provider, model = ["CPUExecutionProvider"], plugins.graph_reading().load(path)
    if DIALECT_KEY in model.metadata_props:
        memory.refuse_beyond(path, WIDENED_FACTOR * _float32_bytes(model))
        settings.add_session_config_entry(*AS_WRITTEN)
    is_linked = not is_text(path) or any(file.is_symlink() for file in path.parent.iterdir())
    has_twin = twin.is_needed(model)
    if not is_linked and not has_twin:
        return ort.InferenceSession(path, settings, providers=provider)
    folder = _follow_links(model, path)
    if has_twin:
        twin.become(model)
    with with_text_name(folder) as named:
        settings.add_session_config_entry(FOLDER_KEY, str(named))
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings, providers=provider)


def _float32_bytes(model: ir.Model) -> int:
    """Of what is stored beside the graph, widened."""
    tensors = plugins.graph_reading().external_tensors(model)
    return FLOAT_BYTES * sum(tensor.size for tensor in tensors)


def _follow_links(model: ir.Model, path: Path) -> Path:
    """The folder that places of weights are relative to from here on. Only names beside the model are followed."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    stored = [(v, v.const_value) for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    beside = {name for name in {str(tensor.location) for _, tensor in stored} if Path(name).name == name}
    real = {name: (path.parent / name).resolve() for name in beside}
    folder = Path(os.path.commonpath([file.parent for file in real.values()])) if real else path.parent.absolute()
    for value, tensor in stored:
        if tensor.location in real:
            value.const_value = _moved(tensor, real[str(tensor.location)].relative_to(folder))
    return folder


def _moved(tensor: ir.ExternalTensor, location: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        str(location), tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name
    )
