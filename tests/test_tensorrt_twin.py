"""What onnxruntime runs of a graph for TensorRT: one that computes in bf16 by its twin in float32, and every one as it is written."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from jamba_models import make_jamba
from nemotron_h_models import make_nemotron_h
from onnx import AttributeProto, TensorProto
from onnx_graphs import wired
from state_models import ALL, with_states
from stepping import OwnSteps, own_logits

from compress import formats
from compress.apply import exporting
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError
from compress.formats.activations import Activation
from compress.model.roles import QUANTIZABLE, Role
from compress.passes.quantization import rounding
from compress.runtime import twin
from compress.runtime.onnx_files import open_session
from compress.runtime.onnx_session import OnnxSession
from exporters.dialects.portable import Portable
from exporters.dialects.tensorrt import TensorRT, TensorRTHalf, TensorRTSingle
from exporters.graph import artifact, reading
from exporters.graph.builder import WeightFile, at_edge, declare, rename

BF16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
SOURCES = {"jamba": make_jamba, "nemotron_h": make_nemotron_h}
FORMS = {
    "as it came": (None, None),
    "int8": ("int8", None),
    "int8, static inputs": ("int8", "static-int8"),
    "int8 in groups": ("int8-g16", None),
    "int4": ("int4-g32", None),
    "fp8": ("fp8-e4m3", None),
    "fp8, static inputs": ("fp8-e4m3-tensor", "static-fp8"),
}


@pytest.fixture(scope="module", params=SOURCES)
def model(request, tmp_path_factory):
    return Checkpoint(SOURCES[request.param](tmp_path_factory.mktemp(request.param) / "source")).model


def stored_as(model, number_format, inputs):
    """The model with its matrices rounded to nearest, the experts' and all others that a format divides."""
    if number_format is None:
        return model

    def change(weight):
        if weight.role not in QUANTIZABLE or len(weight.shape) != 2:
            return weight
        known = formats.get(formats.fitting(number_format, weight.shape))
        rounded = rounding.to_nearest(weight, known, clips=False)
        asks = inputs is not None and weight.role in (Role.EXPERTS, Role.ATTENTION_QKV, Role.SSM_IN)
        return replace(rounded, activation=Activation(inputs, lambda: 0.05)) if asks else rounded

    return replace(model, units=tuple(unit.map(change) for unit in model.units))


def twin_of(path) -> onnx.ModelProto:
    graph = reading.load(path)
    twin.become(graph)
    return ir.to_proto(graph)


# the file and its twin


def places(graph, outer, depth):
    """Every value by what makes it, Casts left out: the name of an input or a weight, or the number of a node and an output."""
    found = dict(outer)
    found |= {value.name: ("given", value.name) for value in (*graph.input, *graph.initializer)}
    others = 0
    for node in graph.node:
        if node.op_type == "Cast":
            found[node.output[0]] = found[node.input[0]]
        else:
            found |= {name: (depth, others, place) for place, name in enumerate(node.output)}
            others += 1
    return found


def skeleton(graph, outer=(), depth=0):
    """Operators, attributes and wiring of a graph and its bodies, but for Casts and types."""
    known = places(graph, outer, depth)
    nodes = [
        (
            node.op_type,
            node.domain,
            [known[name] if name else None for name in node.input],
            sorted((a.name, meaning(a, known, depth)) for a in node.attribute),
        )
        for node in graph.node
        if node.op_type != "Cast"
    ]
    return repr((nodes, [known[value.name] for value in graph.output], [value.name for value in graph.input]))


def meaning(attribute, known, depth):
    if attribute.type == AttributeProto.GRAPH:
        return skeleton(attribute.g, known, depth + 1)
    if attribute.type == AttributeProto.TENSOR:
        return str(onnx.numpy_helper.to_array(attribute.t).astype(np.float64))
    return str(onnx.helper.get_attribute_value(attribute))


def surface(graph):
    """What is stored, where, and what comes in and goes out, with all types."""
    return [value.SerializeToString() for value in (*graph.initializer, *graph.input, *graph.output)]


def assert_differ_in_types_and_casts_only(path):
    file, other = onnx.load(path, load_external_data=False), twin_of(path)
    assert skeleton(file.graph) == skeleton(other.graph)
    assert surface(file.graph) == surface(other.graph)
    of_twin = onnx.shape_inference.infer_shapes(other, check_type=True, strict_mode=True).graph  # refuses mixed types
    cast = {name for node in other.graph.node if node.op_type == "Cast" for name in node.output}
    given = {value.name for value in other.graph.initializer}
    kept = {value.name for value in of_twin.value_info if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    assert kept - given <= cast  # nothing else is bf16


@pytest.mark.parametrize("form", FORMS)
def test_file_and_twin_differ_in_types_and_casts_only(model, tmp_path, form):
    path = wired(stored_as(model, *FORMS[form]), tmp_path / "graph", dialect=TensorRT)
    assert twin.is_needed(reading.load(path))
    assert_differ_in_types_and_casts_only(path)


@pytest.mark.parametrize("dialect, other", [(TensorRTHalf, BF16), (TensorRT, ir.DataType.FLOAT16), (TensorRT, FLOAT)])
def test_layers_in_several_types_have_a_twin_where_one_is_bf16(model, tmp_path, dialect, other):
    path = wired(model, tmp_path / "graph", dialect=dialect, types={"layer.1": other})
    assert twin.is_needed(reading.load(path))
    assert_differ_in_types_and_casts_only(path)
    ids = np.random.default_rng(0).integers(3, 60, (2, 12))
    expected = own_logits(model, torch.from_numpy(ids), [12]).numpy()
    off = np.abs(OnnxSession(path).start(2).step(ids) - expected).max(-1)
    assert np.median(off) <= 0.05 * np.abs(expected).max()  # few tokens may go to another expert


def test_states_of_every_format_have_a_twin(model, tmp_path):
    kinds = {"recurrent_state": {"format": "fp8-e4m3", "rounding": "stochastic"}, "conv_state": {"format": "bf16"},
             "key": {"format": "int4"}, "value": {"format": "bf16", "rounding": "stochastic"}}  # fmt: skip
    source = SOURCES[model.model_type](tmp_path / "source")
    kept = Checkpoint(with_states(source, tmp_path / "kept", kinds)).model
    path = wired(kept, tmp_path / "graph", dialect=TensorRT)
    assert_differ_in_types_and_casts_only(path)
    assert np.isfinite(OnnxSession(path).start(1).step(np.array([[5, 6, 7]]))).all()


@pytest.mark.parametrize("dialect", [Portable, TensorRTHalf, TensorRTSingle])
def test_what_only_stores_bf16_is_run_as_it_is(model, tmp_path, monkeypatch, dialect):
    """Weights, and states where a pass decided so."""
    states = {name: {"format": "bf16"} for name in ALL}
    source = SOURCES[model.model_type](tmp_path / "source")
    kept = Checkpoint(with_states(source, tmp_path / "kept", states)).model
    path = wired(kept, tmp_path / "graph", dialect=dialect)
    assert BF16 in {value.dtype for value in reading.load(path).graph.inputs}
    assert not twin.is_needed(reading.load(path))
    monkeypatch.setattr(twin, "become", lambda graph: pytest.fail("a twin was made"))
    assert np.isfinite(OnnxSession(path).start(1).step(np.array([[5, 6, 7]]))).all()


# what a twin computes


def saved(folder, inputs, build, dialect="tensorrt", new=TensorRT.new_graph):
    """What `build(graph, *values)` makes of inputs, name -> type and width, as an output in the type it has."""
    weights = WeightFile(folder / "model.onnx.data")
    graph = new(weights)
    values = [declare(name, dtype, ["rows", width]) for name, (dtype, width) in inputs.items()]
    y, dtype, width = build(graph, *values)
    weights.close()
    rename(y, "y", dtype, ["rows", width])
    artifact.save(graph.finish(values, [y], "test"), {}, folder / "model.onnx", dialect)
    return folder / "model.onnx"


def run(path, x: torch.Tensor) -> torch.Tensor:
    session, element = open_session(path, ort.SessionOptions()), {torch.bfloat16: 16, torch.float32: 1}[x.dtype]
    held = x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()
    (y,) = session.run_with_ort_values(None, {"x": ort.OrtValue.ortvalue_from_numpy_with_onnx_type(held, element)})
    cast = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["y"], ["z"], to=TensorProto.FLOAT)], "widen",
        [onnx.helper.make_tensor_value_info("y", y.element_type(), None)],
        [onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )  # fmt: skip
    widen = onnx.helper.make_model(cast, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    (z,) = ort.InferenceSession(widen.SerializeToString()).run_with_ort_values(None, {"y": y})
    return torch.from_numpy(z.numpy().copy())


def test_a_twin_rounds_at_the_edges_of_blocks_and_where_the_file_casts(tmp_path):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 16, generator=g).bfloat16(), torch.randn(16, 16, generator=g).bfloat16()

    def build(graph, given):
        product = graph.op("MatMul", given, graph.stored("w", w))
        edge = at_edge(graph.op("Add", given, product), BF16)
        square = graph.op("Mul", edge, edge)  # inside a block: not rounded
        half = graph.from_float32(graph.op("Mul", graph.float32(square), graph.constant(0.3, np.float32)))
        return graph.op("Add", half, product), BF16, 16

    product = x.float() @ w.float()
    edge = (x.float() + product).bfloat16().float()
    half = (edge.square() * 0.3).bfloat16().float()
    expected = (half + product).bfloat16().float()
    actual = run(saved(tmp_path, {"x": (BF16, 16)}, build), x)
    assert (actual == expected).float().mean() > 0.95  # the rest: sums in another order, at a tie
    assert (actual - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_a_bf16_graph_is_as_near_as_bf16_goes_and_keeps_its_states_in_it(nemotron, tiny, tmp_path):
    for name, folder in (("jamba", tiny), ("nemotron", nemotron)):
        source = Checkpoint(folder).model
        path = exporting.export_checkpoint(folder, "tensorrt", tmp_path / name, ["build=never"]) / "model.onnx"
        ids = np.random.default_rng(1).integers(3, 2000, (2, 40))
        expected, generation = own_logits(source, torch.from_numpy(ids), [40]), OnnxSession(path).start(2)
        pieces = [generation.step(ids[:, :32]), *(generation.step(ids[:, t : t + 1]) for t in range(32, 40))]
        actual = torch.from_numpy(np.concatenate(pieces, 1))
        p, q = expected.log_softmax(-1), actual.log_softmax(-1)
        assert 1e-6 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.01
        kept = {name.rpartition(".")[2]: value.dtype for name, value in generation.states().items()}
        assert kept == {"conv_state": torch.bfloat16, "recurrent_state": torch.float32, "key": torch.bfloat16,
                        "value": torch.bfloat16}  # fmt: skip


# as it is written


def test_rounded_inputs_of_int8_products_are_summed_without_saturation(tmp_path):
    """onnxruntime makes unsigned products of them by default, whose sums are cut off at 16 bits on some processors."""
    x, w = torch.full((3, 64), 127.0), torch.full((64, 8), 127, dtype=torch.int8)

    def build(graph, given):
        one = graph.number(1.0)
        whole = graph.op("QuantizeLinear", given, one, output_dtype=ir.DataType.INT8)
        scales = graph.stored("scales", torch.full((8,), 1.0))
        wide = graph.op("DequantizeLinear", graph.stored("w", w), scales, axis=1)
        return graph.op("MatMul", graph.op("DequantizeLinear", whole, one), wide), FLOAT, 8

    path = saved(tmp_path, {"x": (FLOAT, 64)}, build, new=TensorRTSingle.new_graph)
    assert torch.equal(run(path, x), torch.full((3, 8), 127.0 * 127 * 64))


@pytest.mark.parametrize("number_format", ["int8", "int4-g32"])
def test_inputs_of_products_with_quantized_weights_are_not_rounded(model, tmp_path, number_format):
    """By default, and in portable graphs, onnxruntime rounds them to 8 bits."""
    quantized, ids = stored_as(model, number_format, None), np.random.default_rng(0).integers(3, 60, (2, 12))
    path = wired(quantized, tmp_path / "graph", dialect=TensorRTSingle)
    named = onnx.load(path, load_external_data=False)
    onnx.helper.set_model_props(
        named, {p.key: p.value for p in named.metadata_props} | {"compress.dialect": "tensorrt"}
    )
    onnx.save(named, path)
    generation, ours, start = OnnxSession(path).start(2), OwnSteps(quantized), 0
    for end in (8, 9, 12):
        expected = ours.step(torch.from_numpy(ids[:, start:end])).numpy()
        assert np.abs(generation.step(ids[:, start:end]) - expected).max() <= 1e-4
        start = end


def test_weights_that_would_not_fit_when_they_are_widened_are_refused(tmp_path, monkeypatch):
    """A file of 20 KB whose matrix takes 80 KB in float32."""
    stored = torch.zeros(128, 160, dtype=torch.int8)

    def build(graph, given):
        wide = graph.op("DequantizeLinear", graph.stored("w", stored), graph.number(1.0))
        return graph.op("MatMul", given, wide), FLOAT, 160

    path = saved(tmp_path, {"x": (FLOAT, 128)}, build, new=TensorRTSingle.new_graph)
    monkeypatch.setattr("compress.runtime.memory.available", lambda: 85_000)
    with pytest.raises(InputError, match="of memory to run"):
        open_session(path, ort.SessionOptions())
    monkeypatch.setattr("compress.runtime.memory.available", lambda: 120_000)
    assert torch.equal(run(path, torch.ones(2, 128)), torch.zeros(2, 160))
