"""Looking into exported graphs, and making graphs that no exporter writes."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from compress.runtime import graph_names
from exporters.dialects.portable import Portable
from exporters.graph import artifact, wiring
from exporters.graph.builder import WeightFile, declare, rename
from exporters.graph.form import WHOLE

EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}  # fused products in float32, as our own forward has them


def make_session(path: Path, options: dict, optimized: Path | None = None) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.intra_op_num_threads = 1
    for key, value in options.items():
        settings.add_session_config_entry(key, value)
    if optimized:
        settings.optimized_model_filepath = str(optimized)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def run_graph(folder: Path, inputs: dict[str, np.ndarray], width: int, build, options=EXACT, graph=Portable.new_graph):
    """What `build(graph, *values)` makes of inputs, an output [..., width], under onnxruntime; checked as an export is."""
    weights = WeightFile(folder / "model.onnx.data")
    graph = graph(weights)
    values = [
        declare(name, ir.DataType.from_numpy(x.dtype), [f"{name}{i}" for i in range(x.ndim)])
        for name, x in inputs.items()
    ]
    rank = next(iter(inputs.values())).ndim
    y = rename(build(graph, *values), "y", ir.DataType.FLOAT, [*(f"y{i}" for i in range(rank - 1)), width])
    weights.close()
    artifact.save(graph.finish(values, [y], "test"), {}, folder / "model.onnx")
    return make_session(folder / "model.onnx", options).run(None, inputs)[0]


def wired(model, folder: Path, form=WHOLE, dialect=Portable, types=None) -> Path:
    """A graph of a model in a form that no recipe asks for; checked as an export is."""
    folder.mkdir(exist_ok=True)
    weights = WeightFile(folder / "model.onnx.data")
    graph = wiring.build(model, dialect, weights, lambda _: None, form, types)
    weights.close()
    artifact.save(graph, model.config_json, folder / "model.onnx")
    return folder / "model.onnx"


class Steps:
    """A session with its states: `given` is input_ids or hidden_states."""

    def __init__(self, path: Path):
        self.session, self.states = make_session(path, EXACT), None

    def step(self, given: np.ndarray, mask: np.ndarray) -> np.ndarray:
        inputs = self.session.get_inputs()
        past = [value for value in inputs if graph_names.is_past(value.name)]
        if self.states is None:
            sizes = ([size if isinstance(size, int) else 0 for size in value.shape[1:]] for value in past)
            self.states = [np.zeros((len(given), *shape), np.float32) for shape in sizes]
        feeds = {inputs[0].name: given, "attention_mask": mask}
        output, *self.states = self.session.run(
            None, feeds | {v.name: s for v, s in zip(past, self.states, strict=True)}
        )
        return output


def all_graphs(graph: onnx.GraphProto):
    """The graph and the bodies of its control-flow operators."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)


def assert_shapes_are_inferred(path, monkeypatch) -> None:
    """onnxruntime's symbolic_shape_infer, without its guesses, tells a shape of every value of the graph."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    monkeypatch.chdir(path.parent)  # where it looks for the weights
    model = onnx.load(path.name, load_external_data=False)
    found = SymbolicShapeInference.infer_shapes(model, auto_merge=False, guess_output_rank=False)
    assert {o for node in model.graph.node for o in node.output} <= {
        v.name for v in (*found.graph.value_info, *found.graph.output)
    }
    declared = [[d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in found.graph.output]
    assert declared[0][:2] == ["batch_size", "sequence_length"] and isinstance(declared[0][2], int)
