"""The audit: what a recipe did passes, whatever its formats, and single faults planted as a bug would are named.

Faults are planted by `benchmarks/planted_faults.py`, which says what a fault is in plain tensors.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jamba_models import make_jamba
from nemotron_h_models import make_nemotron_h
from planted_faults import FAULTS, Planter

from compress import formats
from compress.apply import pipeline
from compress.check import audit, auditing, layer_audit
from compress.check.audit import Models
from compress.checkpoint.reader import Checkpoint
from compress.model.roles import Role
from compress.model.weight import Weight
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.artifacts import find_artifact, open_artifact

CALIBRATION = "calibration: {prompts: [self], samples: 8, length: 64}\n"
GPTQ_INT4 = {
    "quantize": {"method": "gptq", "weights": "int4-g32", "roles": {"lm_head": "int8-g32", "attention_qkv": "int8-g32"}}
}


def applied_to(source: Path, folder: Path, *passes: dict, exports: bool | str = True) -> Path:
    """An output folder with a checkpoint and an ONNX (or another) export, without its manifest: damage of files is found
    elsewhere."""
    path = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True)
    exported = exports if isinstance(exports, str) else "onnx: {}" if exports else ""
    path.write_text(f"version: 1\n{CALIBRATION}passes: {json.dumps(passes)}\nexport: [{exported}]\n")
    out = folder / "out"
    pipeline.apply(pipeline.Job(load_recipe(str(path)), resolve(str(source)), out))
    (out / "manifest.json").unlink()
    return out


def models_of(original: Path, artifact: Path) -> Models:
    return Models(*(open_artifact(find_artifact(path)).model() for path in (original, artifact)))


def failures(original: Path, artifact: Path) -> list[dict]:
    """Rows of tensors that did not pass; of layers, where all tensors did."""
    models = models_of(original, artifact)
    rows = list(audit.audit("artifact", models, lambda parameters: None))
    if all(row["passed"] for row in rows):
        ids = layer_audit.tokens(open_artifact(original), 0)
        rows += layer_audit.audit("artifact", models, ids, "cpu", lambda count: None)
    return [row for row in rows if not row["passed"]]


@pytest.fixture(scope="module")
def awkward(tmp_path_factory) -> dict[str, Path]:
    """Random models whose sizes nothing divides."""
    folder = tmp_path_factory.mktemp("awkward")
    return {
        "jamba": make_jamba(folder / "jamba"),
        "tied": make_jamba(folder / "tied", tie_word_embeddings=True, vocab_size=66),
        "nemotron_h": make_nemotron_h(folder / "nemotron_h"),
    }


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, tiny, nemotron) -> dict[str, Path]:
    """The reference models in four bits by GPTQ, the hardest to judge."""
    folder = tmp_path_factory.mktemp("quantized")
    return {model.name: applied_to(model, folder / model.name, GPTQ_INT4) for model in (tiny, nemotron)}


# no alarm


OTHERS = ("int8-tensor", "int8-g32", "int4-g16", "fp8-e4m3-b128")


@pytest.mark.parametrize(
    ("family", "number_format"),
    [("jamba", name) for name in (*formats.FILES, *formats.PLAIN)]
    + [(family, name) for family in ("tied", "nemotron_h") for name in OTHERS],
)
def test_rounding_to_nearest_passes_and_a_graph_is_read_back_as_it_was_written(
    awkward, tmp_path, family, number_format
):
    source = awkward[family]
    out = applied_to(source, tmp_path, {"quantize": {"method": "rtn", "weights": number_format}})
    assert failures(source, out / "checkpoint") == []
    assert failures(source, out / "onnx") == []
    written = {weight.name: weight for weight in Checkpoint(out / "checkpoint", allow_quantized=True).model.weights}
    for weight in open_artifact(out / "onnx" / "model.onnx").model().weights:
        assert weight.format == written[weight.name].format
        assert torch.equal(weight.dense(), written[weight.name].dense()), weight.name
        assert torch.equal(weight.dense(slice(0, 2)), written[weight.name].dense()[:2]), weight.name


IN_BF16 = "tensorrt: {precision: bf16, build: never}"


@pytest.mark.parametrize(
    ("family", "number_format"),
    [
        ("jamba", "int8-tensor"),
        ("jamba", "fp8-e4m3-tensor"),
        ("tied", "int4-g16"),
        ("tied", "fp8-e4m3"),
        ("nemotron_h", "int8"),
        ("nemotron_h", "int8-tensor"),
    ],
)
def test_scales_rounded_to_the_type_of_hidden_states_are_no_fault(awkward, tmp_path, family, number_format):
    """In bf16 they are off by up to 2^-8, more than rounding to int8 explains; beside a checkpoint that has them in float32, too."""
    passes = {"quantize": {"method": "rtn", "weights": number_format}}
    out = applied_to(awkward[family], tmp_path, passes, exports=IN_BF16)
    assert failures(awkward[family], out / "tensorrt") == []
    assert failures(out / "checkpoint", out / "tensorrt") == []


@pytest.mark.parametrize("original", ["as it came", "quantized"])
def test_scales_that_are_off_by_more_than_their_type_explains_are_named(awkward, tmp_path, original):
    out = applied_to(awkward["jamba"], tmp_path, {"quantize": {"weights": "int8-tensor"}}, exports=IN_BF16)
    models = models_of(awkward["jamba"] if original == "as it came" else out / "checkpoint", out / "tensorrt")
    name = "model.layers.1.feed_forward.experts.1.down_proj.weight"

    def off(weight: Weight) -> Weight:
        load = lambda rows=None: replace(stored := weight.load(rows), scales=stored.scales * 1.01)  # noqa: E731
        return replace(weight, load=load) if weight.name == name else weight

    candidate = replace(models.candidate, units=tuple(unit.map(off) for unit in models.candidate.units))
    rows = audit.audit("artifact", Models(models.original, candidate), lambda parameters: None)
    assert [row["tensor"] for row in rows if not row["passed"]] == [name]


@pytest.mark.parametrize(
    "passes",
    [
        ({"quantize": {"method": "gptq", "weights": "int8", "activations": "static-int8"}},),
        ({"quantize": {"method": "rtn", "weights": "fp8-e4m3", "activations": "dynamic-fp8"}},),
        ({"quantize": {"method": "rtn", "weights": "int8", "equalize": 0.5}},),
        ({"prune_experts": {"method": "reap", "keep": 2}}, {"quantize": {"method": "gptq", "weights": "int8"}}),
        ({"prune_experts": {"method": "merge", "keep": 2}},),
        ({"prune_experts": {"method": "reconstruction", "keep": 2}}, GPTQ_INT4),
        ({"state_precision": {"ssm_state": {"format": "int8", "scale": "static"}, "kv_cache": "int8"}},),
    ],
)
@pytest.mark.parametrize("family", ["jamba", "nemotron_h"])
def test_what_passes_record_is_no_fault(awkward, tmp_path, family, passes):
    out = applied_to(awkward[family], tmp_path, *passes)
    for artifact in ("checkpoint", "onnx"):
        assert failures(awkward[family], out / artifact) == []


@pytest.mark.parametrize("model", ["tiny-jamba", "tiny-nemotron-h"])
def test_gptq_in_four_bits_is_no_fault(quantized, tiny, nemotron, model):
    source = {path.name: path for path in (tiny, nemotron)}[model]
    for artifact in ("checkpoint", "onnx"):
        assert failures(source, quantized[model] / artifact) == []


def test_a_checkpoint_is_judged_against_the_one_it_was_made_from(awkward, tmp_path):
    """The original may have been pruned already."""
    first = applied_to(awkward["jamba"], tmp_path / "first", {"prune_experts": {"method": "reap", "keep": 2}})
    second = applied_to(first / "checkpoint", tmp_path / "second", {"quantize": {"method": "rtn", "weights": "int8"}})
    assert failures(first / "checkpoint", second / "checkpoint") == []
    assert failures(awkward["jamba"], second / "checkpoint") == []


def test_two_artifacts_of_one_original_are_not_held_against_each_other(compress_cli, awkward, tmp_path):
    """The last release is no original: what differs between the two is not for an audit to judge."""
    outs = [
        applied_to(awkward["jamba"], tmp_path / bits, {"quantize": {"method": "rtn", "weights": bits}})
        for bits in ("int8", "fp8-e4m3")
    ]
    target = tmp_path / "r.json"
    arguments = ("--prompts", "self", "--samples", "2", "--length", "8", "--json", str(target))
    found = compress_cli("check", *(str(out / "checkpoint") for out in outs), *arguments)
    assert found.exit_code == 0, found.stderr
    result = json.loads(target.read_text())
    assert result["audit"] == []
    assert "checkpoint: not audited" in result["remarks"][0]


# faults


# no more than four bits make of the same matrix
BELOW_ROUNDING = {"expert noise 5 %", "ssm in_proj noise 5 %", "expert times 0.95"}


NOT_THERE = {"dt_proj int4 per tensor", "gate and up swapped", "expert's gate and up swapped", "x_proj rows swapped"}
PLANTED = [("tiny-jamba", name) for name in FAULTS if name not in BELOW_ROUNDING]
PLANTED += [("tiny-nemotron-h", name) for name in FAULTS if name not in BELOW_ROUNDING | NOT_THERE]


@pytest.mark.parametrize(("model", "fault"), PLANTED)
def test_a_planted_fault_is_found_and_named(quantized, tiny, nemotron, tmp_path, model, fault):
    source = {path.name: path for path in (tiny, nemotron)}[model]
    planter = Planter(quantized[model] / "checkpoint", tmp_path / "checkpoint")
    FAULTS[fault](planter)
    found = failures(source, planter.folder)
    assert found
    touched = {row["tensor"] for row in found if "tensor" in row}
    assert touched <= planter.touched
    layers = {name.split("layers.")[1].split(".")[0] for name in planter.touched if "layers." in name}
    assert {str(row["layer"]) for row in found if "layer" in row} <= layers


def notes_of(original: Path, artifact: Path) -> list[str]:
    return [f"{row['tensor']} {row['note']}" for row in failures(original, artifact)]


@pytest.mark.parametrize(
    ("fault", "note"),
    [
        ("keys times 2", "model.layers.2.self_attn.k_proj.weight is 2 times what it ought to be"),
        ("D zeroed", "model.layers.0.mamba.D is all zero; it was kept as it came"),
        (
            "router rows swapped",
            "model.layers.1.feed_forward.router.weight differs in rows 1, 4 of 8; it was kept as it came",
        ),
        (
            "first conv tap zeroed",
            "model.layers.0.mamba.conv1d.weight is zero in column 0 of 4; it was kept as it came",
        ),
        (
            "norm times 1.1",
            "model.layers.0.input_layernorm.weight is 1.1 times what it ought to be; it was kept as it came",
        ),
        ("embedding row swap", "model.embed_tokens.weight differs in rows 200, 300 of 2048"),
        (
            "gate and up swapped",
            "model.layers.0.feed_forward.gate_proj.weight is what model.layers.0.feed_forward.up_proj.weight ought to be",
        ),
    ],
)
def test_it_says_what_is_wrong(quantized, tiny, tmp_path, fault, note):
    planter = Planter(quantized["tiny-jamba"] / "checkpoint", tmp_path / "checkpoint")
    FAULTS[fault](planter)
    assert note in notes_of(tiny, planter.folder)


def test_a_fault_in_the_graph_s_own_weights_is_found(quantized, tiny, tmp_path):
    """The checkpoint beside it is whole: what is audited is what ships."""
    folder = tmp_path / "onnx"
    shutil.copytree(quantized["tiny-jamba"] / "onnx", folder)
    reading = open_artifact(folder / "model.onnx")
    name = "model.layers.4.mamba.A_log"
    import onnx

    tensor = next(
        t for t in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer if t.name == name
    )
    place = {entry.key: entry.value for entry in tensor.external_data}
    with open(folder / place["location"], "r+b") as data:
        data.seek(int(place["offset"]))
        data.write(bytes(int(place["length"])))
    assert reading.config.num_hidden_layers == 8
    assert notes_of(tiny, folder) == [f"{name} is all zero; it was kept as it came"]


def test_states_in_a_format_that_no_pass_decided_on_are_a_fault(quantized, tiny, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(quantized["tiny-jamba"] / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    config["compress"]["states"] = [{"layer": 0, "state": "recurrent_state", "format": "fp8-e4m3"}]
    (folder / "config.json").write_text(json.dumps(config))
    assert notes_of(tiny, folder) == [
        "compress.states keeps recurrent_state of layer 0 in fp8-e4m3, and no pass says that it decided so"
    ]


@pytest.mark.parametrize(
    ("key", "value", "note"),
    [
        ("num_experts_per_tok", 1, "is 1, expected 2: no pass changes it"),
        ("rms_norm_eps", 1e-3, "is 0.001, expected 1e-06: no pass changes it"),
    ],
)
def test_a_value_of_the_configuration_that_no_pass_changes_is_a_fault(quantized, tiny, tmp_path, key, value, note):
    folder = changed_config(quantized["tiny-jamba"], tmp_path, lambda config: config | {key: value})
    assert notes_of(tiny, folder) == [f"config.json: {key} {note}"]


def changed_config(out: Path, folder: Path, change) -> Path:
    shutil.copytree(out / "checkpoint", folder / "checkpoint")
    path = folder / "checkpoint" / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return folder / "checkpoint"


def test_a_tensor_that_was_quantized_and_stands_in_no_record_is_a_fault(quantized, tiny, tmp_path):
    def change(config: dict) -> dict:
        for record in config["compress"]["passes"]:
            for entry in record["changes"]:
                entry["tensors"] = [name for name in entry["tensors"] if "lm_head" not in name] or ["nothing"]
        return config

    folder = changed_config(quantized["tiny-jamba"], tmp_path, change)
    assert notes_of(tiny, folder) == ["lm_head.weight is quantized, and no pass says that it rounded it"]


def test_without_any_record_the_widest_bounds_hold_and_a_remark_says_so(quantized, tiny, tmp_path):
    folder = changed_config(
        quantized["tiny-jamba"], tmp_path, lambda config: {k: v for k, v in config.items() if k != "compress"}
    )
    found = auditing.audited("checkpoint", open_artifact(tiny), open_artifact(folder), seed=0, device="cpu")
    assert all(row["passed"] for row in found.audit)
    assert "does not say what was done to it" in found.remarks[0]


def test_a_candidate_of_another_training_differs_in_every_tensor(awkward, tmp_path):
    other = make_jamba(tmp_path / "other", seed=5)
    found = failures(awkward["jamba"], other)
    ought = [
        weight for weight in Checkpoint(other).model.weights if weight.role != Role.SSM_A
    ]  # which training starts alike
    assert {row["tensor"] for row in found} >= {weight.name for weight in ought if weight.role == Role.EXPERTS}


# the command


def test_a_check_without_limits_fails_on_a_fault_and_names_it(compress_cli, quantized, tiny, tmp_path):
    planter = Planter(quantized["tiny-jamba"] / "checkpoint", tmp_path / "checkpoint")
    FAULTS["A_log + 0.3"](planter)
    arguments = (
        "check",
        str(tiny),
        str(planter.folder),
        "--samples",
        "2",
        "--length",
        "16",
        "--json",
        str(tmp_path / "r.json"),
    )
    found = compress_cli(*arguments)
    assert found.exit_code == 1
    assert "model.layers.0.mamba.A_log: is +0.298 off everywhere; it was kept as it came" in " ".join(
        found.stderr.split()
    )
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["verdict"] == "fail"
    wrong = [row for row in result["audit"] if not row["passed"]]
    assert [row["tensor"] for row in wrong] == ["model.layers.0.mamba.A_log"]
    assert wrong[0]["relative_error"] > wrong[0]["expected_at_most"]
    skipped = compress_cli(*arguments, "--no-audit")
    assert skipped.exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text())["audit"] == []
