"""`layout: transformers.js` of the `onnx` exporter: files and names are where that library looks, and our own commands take
them. That it runs there is tested in tests/compilers."""

import json
import math
import shutil

import numpy as np
import onnx
import pytest
from nemotron_h_models import make_nemotron_h

from compress.apply import exporting
from compress.recipe.source import load_tokenizer
from compress.runtime.artifacts import find_artifact, open_artifact
from compress.runtime.onnx_session import OnnxSession

JS = "layout=transformers.js"


@pytest.fixture(scope="module")
def folder(applied, tmp_path_factory):
    out = tmp_path_factory.mktemp("js") / "out"
    return exporting.export_checkpoint(applied / "checkpoint", "onnx", out, [JS])


def test_files_are_where_the_library_looks(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert {name for name in names if name.startswith("onnx/")} == {"onnx/model.onnx", "onnx/model.onnx_data"}
    assert "genai_config.json" not in names


def test_the_configuration_poses_as_a_model_it_knows_and_says_which_layers_are_which(folder, tiny):
    posed, true = (json.loads((path / "config.json").read_text()) for path in (folder, tiny))
    assert posed["model_type"] == "granitemoehybrid"
    attention = [i % true["attn_layer_period"] == true["attn_layer_offset"] for i in range(true["num_hidden_layers"])]
    assert posed["layer_types"] == ["attention" if is_attention else "mamba" for is_attention in attention]
    assert posed["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": True}
    assert "quantization_config" not in posed
    for key in ("vocab_size", "hidden_size", "num_key_value_heads", "eos_token_id"):
        assert posed[key] == true[key]


@pytest.mark.parametrize("layers", ["MEM*-E", "M-M", "*E"])
def test_transformers_reads_the_tokenizer_beside_the_configuration_of_another_family(tmp_path, nemotron, layers):
    """It checks the configuration as one of the type it poses as."""
    source = make_nemotron_h(tmp_path / "source", layers_block_type=layers)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nemotron / name, source)
    values = json.loads((source / "config.json").read_text()) | {"time_step_limit": [0.0, math.inf], "expand": 3}
    (source / "config.json").write_text(json.dumps(values))
    folder = exporting.export_checkpoint(source, "onnx", tmp_path / "out", [JS])
    assert load_tokenizer(folder)("Once").input_ids
    kinds = json.loads((folder / "config.json").read_text())["layer_types"]
    assert kinds == [{"M": "mamba", "*": "attention"}.get(letter, "moe") for letter in layers]


def test_states_have_its_names_and_nothing_else_changes(folder, applied):
    def declared(path):
        graph = onnx.load(path, load_external_data=False).graph
        return [[value.name for value in values] for values in (graph.input, graph.output)]

    (inputs, outputs), (ours_in, ours_out) = declared(folder / "onnx/model.onnx"), declared(applied / "onnx/model.onnx")
    assert inputs[:2] == ["input_ids", "attention_mask"] and outputs[0] == "logits"
    assert {"past_conv.0", "past_ssm.0", "past_key_values.2.key", "past_key_values.2.value"} <= set(inputs)
    assert {"present_conv.0", "present_ssm.0", "present.2.key", "present.2.value"} <= set(outputs)
    assert len(inputs) == len(ours_in) and len(outputs) == len(ours_out)
    data = (folder / "onnx/model.onnx_data").read_bytes()
    assert data == (applied / "onnx/model.onnx.data").read_bytes()


def test_a_session_gives_the_same_logits_token_by_token(folder, applied):
    ids = np.random.default_rng(0).integers(3, 2048, (2, 9))
    ours, js = (OnnxSession(path).start(2) for path in (applied / "onnx/model.onnx", folder / "onnx/model.onnx"))
    for piece in (ids[:, :5], *np.split(ids[:, 5:], 4, axis=1)):
        assert np.array_equal(js.step(piece), ours.step(piece))


@pytest.mark.parametrize("named", ["", "onnx", "onnx/model.onnx"])
def test_the_artifact_is_found_with_its_tokenizer(folder, named):
    artifact = open_artifact(find_artifact(folder / named))
    assert artifact.folder == folder and load_tokenizer(artifact.folder)("Once").input_ids


def test_the_commands_take_it(compress_cli, folder, applied, tiny):
    facts = [json.loads(compress_cli("inspect", path, "--json").stdout) for path in (folder, applied / "onnx")]
    assert facts[0] == facts[1]
    texts = [
        compress_cli("run", path, "Once upon a time", "--max-tokens", 8).stdout for path in (folder, applied / "onnx")
    ]
    assert texts[0] == texts[1] and texts[0]
    options = ("--samples", 4, "--length", 32, "--prompts", "heldout", "--limit", "kl_divergence_mean=0.01")
    assert compress_cli("check", tiny, folder, *options).exit_code == 0


def test_a_changed_data_file_is_another_artifact(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / "onnx/model.onnx_data").read_bytes())
    data[-1] ^= 1
    (copy / "onnx/model.onnx_data").write_bytes(data)
    digests = {open_artifact(find_artifact(path)).sha256() for path in (folder, copy)}
    assert len(digests) == 2


def test_a_recipe_writes_it_and_reports_its_files(compress_cli, tiny, tmp_path):
    out = tmp_path / "out"
    settings = (
        "--set",
        "export=[{onnx: {layout: transformers.js}}]",
        "--set",
        "check={samples: 1, length: 48, limits: {}}",
    )
    result = compress_cli("apply", "tiny-int8", "-m", tiny, "-o", out, *settings)
    assert result.exit_code == 0, result.output
    (artifact,) = (a for a in json.loads((out / "report.json").read_text())["artifacts"] if a["kind"] == "onnx")
    assert artifact["path"] == "onnx/onnx/model.onnx"
    files = ("onnx/model.onnx", "onnx/model.onnx_data", "config.json")
    assert artifact["bytes"] == sum((out / "onnx" / name).stat().st_size for name in files)
    assert {row["artifact"] for row in json.loads((out / "report.json").read_text())["checks"]} == {
        "checkpoint",
        "onnx",
    }


@pytest.mark.parametrize(("override", "said"), [
    ("layout=transformer.js", "did you mean 'transformers.js'"), ("layuot=genai", "did you mean 'layout'"),
    ("opset=20", "opset"), ("layout", "expected KEY=VALUE, such as layout=genai"),
])  # fmt: skip
def test_wrong_options_are_refused_in_a_sentence(compress_cli, applied, tmp_path, override, said):
    result = compress_cli("export", applied / "checkpoint", "--to", "onnx", "-o", tmp_path / "out", "--set", override)
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "out").exists()
