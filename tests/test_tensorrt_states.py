"""What graphs for TensorRT remember: in the type that arithmetic takes it in, or as a pass decided; and what users see of it."""

import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from jamba_models import make_jamba
from nemotron_h_models import make_nemotron_h
from onnx_graphs import wired
from state_models import ALL, with_states
from stepping import OwnSteps
from test_onnx_states import EVERY, GraphSteps, assert_kept_alike, padded_tokens

from compress.apply import exporting
from compress.check.expected import expected
from compress.checkpoint.reader import Checkpoint
from compress.runtime.artifacts import find_artifact, open_artifact
from exporters.dialects.tensorrt import TensorRT, TensorRTHalf, TensorRTSingle
from exporters.graph import reading

BF16, FP16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT
OF_DIALECT = {TensorRT: BF16, TensorRTHalf: FP16, TensorRTSingle: FLOAT}
FP8 = onnx.TensorProto.FLOAT8E4M3FN
SOURCES = {"jamba": make_jamba, "nemotron_h": make_nemotron_h}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    return SOURCES[request.param](tmp_path_factory.mktemp(request.param) / "source")


def declared(path) -> dict[str, set[ir.DataType]]:
    """The types of states by their names, in and out alike."""
    graph, found = reading.load(path).graph, {}
    outs = {value.name: value.dtype for value in graph.outputs}
    for value in graph.inputs:
        if value.name.startswith("past"):
            assert outs[value.name.replace("past_key_values", "present")] == value.dtype
            found.setdefault(value.name.rpartition(".")[2], set()).add(value.dtype)
    return found


@pytest.mark.parametrize("dialect", OF_DIALECT)
def test_states_that_no_pass_decided_on_are_in_the_type_that_arithmetic_takes_them_in(source, tmp_path, dialect):
    path = wired(Checkpoint(source).model, tmp_path / "graph", dialect=dialect)
    body = {OF_DIALECT[dialect]}
    assert declared(path) == {"recurrent_state": {FLOAT}, "conv_state": body, "key": body, "value": body}


def test_a_layer_in_another_type_keeps_its_states_in_that(source, tmp_path):
    model = Checkpoint(source).model
    layer = next(layer for layer in model.layers if any(spec.name == "conv_state" for spec in layer.states))
    path = wired(model, tmp_path / "graph", dialect=TensorRTHalf, types={f"layer.{layer.index}": BF16})
    types = {value.name: value.dtype for value in reading.load(path).graph.inputs}
    of_layer = {types[name] for name in types if name.startswith(f"past_key_values.{layer.index}.conv")}
    assert of_layer == {BF16} and declared(path)["conv_state"] == {BF16, FP16}


def test_what_a_pass_decided_stays_so_float32_included(source, tmp_path):
    decided = {"key": {"format": "fp32"}, "conv_state": {"format": "fp32"}, "recurrent_state": {"format": "fp16"}}
    kept = Checkpoint(with_states(source, tmp_path / "kept", decided)).model
    path = wired(kept, tmp_path / "graph", dialect=TensorRT)
    assert declared(path) == {"recurrent_state": {FP16}, "conv_state": {FLOAT}, "key": {FLOAT}, "value": {BF16}}


SPELLED = ["fp8-e4m3, nearest, dynamic", "fp8-e4m3, stochastic, static", "fp8, every 5", "int8, static, + fp8",
           "int4, stochastic, dynamic", "int8, nearest, static"]  # fmt: skip


@pytest.mark.parametrize("name", SPELLED)
def test_a_step_from_the_same_stored_states_stores_the_same_as_our_own_forward(source, tmp_path, name):
    """Bit for bit but for rounding of float32, though TensorRT casts nothing to fp8 and moves no unsigned bytes."""
    model = Checkpoint(with_states(source, tmp_path / "kept", dict.fromkeys(ALL, EVERY[name]))).model
    path = wired(model, tmp_path / "graph", dialect=TensorRTSingle)
    assert_spelled_for_tensorrt(path)
    ids, mask = padded_tokens(24)
    ours, theirs = OwnSteps(model), GraphSteps(path, model.layers)
    for end, size in ((20, 20), (21, 1), (24, 3)):
        theirs.states = [dict(states) for states in ours.states]
        given = ids[:, end - size : end], mask[:, :end]
        expected, actual = ours.step(*given), theirs.step(*given)
        assert (expected - actual)[given[1][:, -size:] == 1].abs().max() <= 1e-3
        assert_kept_alike(model, ours.states, theirs.states)


def assert_spelled_for_tensorrt(path):
    """fp8 comes of QuantizeLinear and goes to DequantizeLinear; unsigned bytes are cast to and from, and not moved."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False)).graph
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    types = {v.name: v.data_type if isinstance(v, onnx.TensorProto) else v.type.tensor_type.elem_type for v in values}
    for node in graph.node:
        assert node.op_type in ("DequantizeLinear", "Shape") or FP8 not in {types.get(name) for name in node.input}
        assert node.op_type == "QuantizeLinear" or FP8 not in {types.get(name) for name in node.output}
        assert node.op_type in ("Cast", "Shape") or onnx.TensorProto.UINT8 not in {
            types.get(name) for name in node.input
        }


# what users see


@pytest.fixture(scope="module")
def output(compress_cli, tmp_path_factory) -> Path:
    """An output folder with a graph in bf16, and one in float32 beside it."""
    folder = tmp_path_factory.mktemp("tensorrt")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "version: 1\nmodel: models/tiny-jamba\npasses:\n  - quantize: {weights: int8}\n"
        "export:\n  - tensorrt: {precision: bf16, build: never}\n"
        "check: {prompts: [heldout], samples: 6, length: 96, limits: default, on_undecided: pass}\n"
    )
    result = compress_cli("apply", recipe, "-o", folder / "out")
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_apply_checks_a_graph_for_tensorrt_with_default_limits(output):
    report = json.loads((output / "report.json").read_text())
    rows = [row for row in report["checks"] if row["artifact"] == "tensorrt" and row["limit"] is not None]
    assert {row["phase"] for row in rows} == {"prefill", "decode"}
    assert not [row for row in rows if row["outcome"] == "missed"]
    assert all(row["passed"] for row in report["audit"] if row["artifact"] == "tensorrt")
    assert json.loads((output / "tensorrt" / "build.json").read_text())["checked"] == "twin"


def test_an_output_folder_means_its_tensorrt_graph_where_there_is_no_portable_one(output, tiny, compress_cli):
    assert find_artifact(output) == output / "tensorrt" / "model.onnx"
    said = compress_cli("run", output, "Once upon a time", "--max-tokens", 4)
    assert said.exit_code == 0 and "tensorrt/model.onnx" in said.stderr
    facts = json.loads(compress_cli("inspect", output, "--json").stdout)
    own = json.loads(compress_cli("inspect", tiny, "--json").stdout)  # float32, and 16 bits for the others
    states = ("kv_bytes_per_token", "ssm_state_bytes", "conv_state_bytes")
    assert [facts[name] for name in states] == [own[name] for name in states]
    checked = compress_cli("check", tiny, output, "--prompts", "heldout", "--samples", 2, "--length", 48, "--json", "-")
    assert checked.exit_code == 0, checked.output
    assert not [row for row in json.loads(checked.stdout)["audit"] if not row["passed"]]


def test_hidden_states_in_16_bits_are_expected_to_cost_and_products_as_written_are_not(tiny, applied, tmp_path):
    original = open_artifact(tiny)

    def cost(source, precision):
        options = [f"precision={precision}", "build=never"]
        folder = exporting.export_checkpoint(source, "tensorrt", tmp_path / f"{source.name}-{precision}", options)
        return expected(original, open_artifact(find_artifact(folder)))

    plain = {precision: cost(tiny, precision).hidden for precision in ("bf16", "fp32")}
    assert plain["bf16"] > plain["fp32"] == 0
    quantized = cost(applied / "checkpoint", "bf16")
    assert quantized.hidden == plain["bf16"]
    assert quantized.inputs == 0 < expected(original, open_artifact(find_artifact(applied / "onnx"))).inputs
    assert quantized.apart > 0
