"""The largest number that graphs of fp16 hold between their nodes, asked of onnxruntime: one graph a layer."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx_graphs import EXACT, make_session, wired

from compress.model.hybrid import HybridModel
from compress.runtime import graph_names
from compress.runtime.eager import Eager
from compress.runtime.inference import embed, empty_state, layer_weights
from exporters.dialects.tensorrt import TensorRTHalf
from exporters.graph.form import Form

HALF = onnx.TensorProto.FLOAT16
MASKED = 60_000  # magnitudes from here on stand for minus infinity where attention is masked


def largest_by_layer(model: HybridModel, ids: torch.Tensor, folder: Path) -> list[float]:
    """ids [B, S] without padding, -> one number a layer; what embedding and head give belongs to the first and the last."""
    folder.mkdir()
    hidden, found = embed(model, ids), []
    for layer in model.layers:
        path = wired(model, folder / str(layer.index), Form(range(layer.index, layer.index + 1)), TensorRTHalf)
        given = ids.numpy() if layer.index == 0 else hidden.half().numpy()
        found.append(max(largest(path, given), float(hidden.abs().max())))
        ops = Eager(layer_weights(model, layer.index, "cpu"), total=ids.shape[1])
        with torch.inference_mode():
            hidden = layer.run(ops, hidden, empty_state(layer, len(ids), "cpu"))[0]
    return found


def largest(path: Path, given: np.ndarray) -> float:
    """`given` is input_ids or hidden_states, without padding."""
    model = onnx.load(path)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    made = {name for node in model.graph.node for name in node.output}
    assert made <= types.keys() | {value.name for value in model.graph.output}, "types of all values are known"
    half = [name for name in made if types.get(name) == HALF]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, HALF, None) for name in half)
    onnx.save(model, path.with_name("heard.onnx"))
    session = make_session(path.with_name("heard.onnx"), EXACT)
    feeds = {session.get_inputs()[0].name: given, "attention_mask": np.ones(given.shape[:2], np.int64)}
    for value in session.get_inputs():
        if graph_names.is_past(value.name):
            shape = [len(given), *(size if isinstance(size, int) else 0 for size in value.shape[1:])]
            feeds[value.name] = np.zeros(shape, np.float16 if "float16" in value.type else np.float32)
    magnitudes = (np.abs(value.astype(np.float32)) for value in session.run(half, feeds) if value.size)
    return max(float(np.where(value < MASKED, value, 0).max()) for value in magnitudes)
