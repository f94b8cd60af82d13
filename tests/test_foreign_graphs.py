"""ONNX files that are not ours, or no longer: one sentence with the path, and nothing else on stderr."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from refusals import refusal, refusal_of_command

import cli
from compress.apply import exporting
from compress.runtime.artifacts import open_artifact
from compress.runtime.onnx_session import OnnxSession

QUICK = ("--prompts", "self", "--samples", "1", "--length", "8")
KEY = "compress.config"


@pytest.fixture(scope="module")
def exported(small, tmp_path_factory) -> Path:
    return exporting.export_checkpoint(small, "onnx", tmp_path_factory.mktemp("exported") / "onnx")


@pytest.fixture
def graph(exported, tmp_path) -> Path:
    """A copy of an exported model.onnx to damage, without a manifest."""
    return Path(shutil.copytree(exported, tmp_path / "graph")) / "model.onnx"


def edit(path: Path, change) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())


def set_metadata(value: str):
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.key == KEY).value = value

    return change


def without_metadata(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]


def config_with(**changes):
    def change(model: onnx.ModelProto) -> None:
        entry = next(entry for entry in model.metadata_props if entry.key == KEY)
        entry.value = json.dumps(json.loads(entry.value) | changes)

    return change


METADATA = {
    "none": without_metadata,
    "not JSON": set_metadata("{"),
    "nested without end": set_metadata("[" * 100_000),
    "a list": set_metadata("[]"),
    "a number": set_metadata("3"),
    "another model": set_metadata('{"model_type": "llama"}'),
    "no model": set_metadata("{}"),
    "a module of ours that is no architecture": set_metadata('{"model_type": "_jamba_config"}'),
    "a model type that is a number": config_with(model_type=7),
    "a key of the wrong type": config_with(hidden_size="many"),
    "a key twice": set_metadata('{"model_type": "jamba", "hidden_size": 40, "hidden_size": 41}'),
}


@pytest.mark.parametrize("change", METADATA.values(), ids=list(METADATA))
def test_metadata_that_is_not_ours_is_refused(compress_cli, small, graph, change):
    edit(graph, change)
    for arguments in (("inspect", graph), ("check", small, graph, *QUICK)):
        assert str(graph) in refusal_of_command(compress_cli(*arguments))


def resize_states(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name.endswith("conv_state"):
            value.type.tensor_type.shape.dim[1].dim_value += 3


def wrong_step(model: onnx.ModelProto) -> None:
    """A graph that loads: the first token id is looked up far outside the table."""
    node = next(node for node in model.graph.node if "input_ids" in node.input and "Shape" not in node.op_type)
    offset = onnx.helper.make_tensor("offset", onnx.TensorProto.INT64, [1], [1 << 20])
    model.graph.initializer.append(offset)
    shift = onnx.helper.make_node("Add", ["input_ids", "offset"], ["shifted"])
    node.input[list(node.input).index("input_ids")] = "shifted"
    model.graph.node.insert(0, shift)


@pytest.mark.parametrize("change", [resize_states, wrong_step])
def test_a_graph_that_fails_while_running_is_refused(compress_cli, small, graph, change):
    edit(graph, change)
    said = refusal_of_command(compress_cli("check", small, graph, *QUICK))
    assert f"{graph}: onnxruntime" in said


def test_onnxruntimes_own_log_stays_out_of_stderr(small, graph):
    """It writes to the descriptor itself, so only a process of its own shows it."""
    edit(graph, wrong_step)
    line = [sys.executable, cli.__file__, "check", str(small), str(graph), *QUICK]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert "\x1b" not in result.stderr


def rename_output(model: onnx.ModelProto) -> None:
    old = model.graph.output[0].name
    model.graph.output[0].name = "scores"
    for node in model.graph.node:
        node.output[:] = ["scores" if name == old else name for name in node.output]


def further_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["B", "S"]))


@pytest.mark.parametrize("change", [rename_output, further_input])
def test_a_graph_with_other_inputs_or_outputs_is_refused(graph, change):
    edit(graph, change)
    assert "not a decoder" in refusal(lambda: OnnxSession(graph))


def test_states_that_are_not_ours_do_not_stop_an_inspection(compress_cli, graph):
    def other_state(model: onnx.ModelProto) -> None:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info("past_key_values.0.foo", onnx.TensorProto.FLOAT, [])
        )

    edit(graph, other_state)
    assert compress_cli("inspect", graph).exit_code == 0


def test_a_graph_named_with_brackets_has_a_digest_of_its_own(graph):
    """The digest is the key of the baseline: one that misses the weights would find another model's."""
    first = graph.rename(graph.with_name("model[1].onnx"))
    digest = open_artifact(first).sha256()
    data = graph.with_name("model.onnx.data")
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert open_artifact(first).sha256() != digest
    assert np.isfinite(OnnxSession(first).start(1).step(np.array([[5]]))).all()


def test_a_graph_with_its_data_under_another_name_counts_it(graph):
    def move(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "weights.bin"

    edit(graph, move)
    data = graph.with_name("model.onnx.data").rename(graph.with_name("weights.bin"))
    digest = open_artifact(graph).sha256()
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    assert open_artifact(graph).sha256() != digest
