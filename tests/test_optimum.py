"""The two doors from optimum: its command line and its registry of export configurations."""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from jamba_models import AWKWARD, make_jamba
from optimum.commands.base import BaseOptimumCLICommand
from optimum.commands.export.base import ExportCommand
from optimum.exporters.tasks import TasksManager
from transformers import AutoConfig

from compress.apply import exporting
from compress.model import families
from compress.runtime.onnx_session import OnnxSession
from exporters.optimum_hook import tasks

ROOT = Path(__file__).parents[1]
HOOK = ROOT / "exporters" / "optimum_hook" / "register_compress.py"  # the wheel has it under optimum/commands/register


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds this project and, before it, `path`."""
    found = os.pathsep.join(str(p) for p in (path, ROOT) if p)
    environment = os.environ | {"PYTHONPATH": found, "NO_COLOR": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


# optimum-cli export compress


def test_the_hook_imports_nothing_heavy():
    """optimum-cli imports it at every start, whatever the user asked for."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1])\n"
        "print([m for m in ('torch', 'transformers', 'onnx', 'onnxruntime', 'compress', 'cli') if m in sys.modules])"
    )
    done = python("-c", code, str(HOOK))
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_hook_lists_one_command_below_export():
    [(command, parent)] = runpy.run_path(str(HOOK))["REGISTER_COMMANDS"]
    assert issubclass(command, BaseOptimumCLICommand)
    assert command.COMMAND.name == "compress"
    assert parent is ExportCommand


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder for the import path with the hook where the wheel puts it; empty where the wheel is installed."""
    if importlib.util.find_spec("optimum.commands.register") is not None:
        return tmp_path
    target = tmp_path / "installed" / "optimum" / "commands" / "register"
    target.mkdir(parents=True)
    shutil.copyfile(HOOK, target / "register_compress.py")
    return tmp_path / "installed"


def optimum_cli(installed: Path, *arguments: object) -> subprocess.CompletedProcess:
    code = "import sys; from optimum.commands.optimum_cli import main; sys.argv[0] = 'optimum-cli'; main()"
    return python("-c", code, *map(str, arguments), path=installed)


def test_optimum_cli_exports_a_model(installed, small, tmp_path):
    done = optimum_cli(installed, "export", "compress", small, tmp_path / "onnx")
    assert done.returncode == 0, done.stderr
    assert OnnxSession(tmp_path / "onnx" / "model.onnx").vocab_size == AWKWARD["vocab_size"]


def test_optimum_cli_passes_on_the_exit_code_and_the_sentence(installed, tmp_path):
    done = optimum_cli(installed, "export", "compress", tmp_path / "nothing", tmp_path / "onnx")
    assert done.returncode == 2
    assert "nothing" in done.stderr
    assert "Traceback" not in done.stderr


# TasksManager


@pytest.fixture(scope="module", autouse=True)
def _registered():
    tasks.register()


def exporter_config(folder: Path, task: str = "text-generation-with-past"):
    constructor = TasksManager.get_exporter_config_constructor(
        "onnx", model_type="jamba", task=task, library_name="transformers"
    )
    return constructor(AutoConfig.from_pretrained(folder))


@pytest.mark.parametrize(("task", "use_past"), [("text-generation", False), ("text-generation-with-past", True)])
def test_optimum_finds_the_export_configuration_of_jamba(small, task, use_past):
    config = exporter_config(small, task)
    assert isinstance(config, tasks.HybridExporterConfig)
    assert (config.task, config.use_past) == ("text-generation", use_past)


def test_registering_twice_changes_nothing(small):
    tasks.register()
    supported = TasksManager.get_supported_tasks_for_model_type("jamba", "onnx", library_name="transformers")
    assert set(supported) == {"text-generation", "text-generation-with-past"}
    assert isinstance(exporter_config(small), tasks.HybridExporterConfig)


def dynamic_axes(values) -> dict[str, dict[int, str]]:
    """Name -> the dynamic dimensions as the graph itself declares them."""
    return {
        value.name: {i: d.dim_param for i, d in enumerate(value.type.tensor_type.shape.dim) if d.dim_param}
        for value in values
    }


@pytest.mark.parametrize("changes", [{}, {"attn_layer_period": 2, "attn_layer_offset": 0, "mamba_d_state": 3}])
def test_inputs_and_outputs_in_optimums_terms_are_those_of_the_exported_graph(tmp_path, changes):
    source = make_jamba(tmp_path / "source", num_hidden_layers=4, **changes)
    config = exporter_config(source)
    path = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx") / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    assert config.inputs == dynamic_axes(graph.input)
    assert config.outputs == dynamic_axes(graph.output)


def test_inputs_of_the_reference_model_by_hand(tiny):
    inputs = exporter_config(tiny).inputs
    assert inputs["input_ids"] == {0: "batch_size", 1: "sequence_length"}
    assert inputs["attention_mask"] == {0: "batch_size", 1: "total_sequence_length"}
    assert inputs["past_key_values.0.conv_state"] == {0: "batch_size"}
    assert inputs["past_key_values.0.recurrent_state"] == {0: "batch_size"}
    assert inputs["past_key_values.2.key"] == {0: "batch_size", 2: "past_sequence_length"}
    assert len(inputs) == 2 + 8 * 2


def test_dummy_inputs_are_made_for_every_input(small):
    """What optimum's own tools ask a configuration for."""
    config = exporter_config(small)
    dummies = config.generate_dummy_inputs(framework="np")
    assert dummies.keys() == config.inputs.keys()
    assert np.asarray(dummies["input_ids"]).ndim == 2


def test_the_normalized_configuration_has_optimums_names(tiny):
    normalized = tasks.HybridConfig(AutoConfig.from_pretrained(tiny))
    assert (normalized.vocab_size, normalized.hidden_size, normalized.num_layers) == (2048, 160, 8)
    assert (normalized.num_attention_heads, normalized.eos_token_id) == (5, 2)
    assert normalized.architecture.config.max_position_embeddings == 8192


def test_every_family_is_registered():
    for name in families.names():
        supported = TasksManager.get_supported_tasks_for_model_type(name, "onnx", library_name="transformers")
        assert set(supported) == {"text-generation", "text-generation-with-past"}
