"""TensorRT-RTX builds an engine of every kind of graph, without a GPU, and its weights are as small as their formats say."""

import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import builders
import pytest
from exported_models import MODELS
from jamba_models import make_jamba

from compress.apply import exporting, pipeline
from compress.checkpoint.reader import Checkpoint
from compress.model.roles import Role
from compress.model.weight import Weight
from compress.output_folder.build_facts import BuildFacts
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from exporters.engines import messages, process
from exporters.engines.build import Wanted, build
from exporters.graph import reading

pytestmark = pytest.mark.compilers

SOURCES = Path(__file__).resolve().parents[2] / "models"
CALIBRATION = {"prompts": ["prose"], "samples": 4, "length": 128}
ROUNDED = {
    "fp8": ("bf16", [{"quantize": {"weights": "fp8-e4m3", "activations": "static-fp8"}}]),
    "int8 with int8 inputs": ("fp16", [{"quantize": {"weights": "int8", "activations": "static-int8"}}]),
}
CASES = {
    "fp16": ("fp16", []),
    "bf16": ("bf16", []),
    "int8": ("fp16", [{"quantize": {"weights": "int8"}}]),
    "int4": ("bf16", [{"quantize": {"weights": "int4-g64", "roles": {"embedding": "int8"}}}]),
    **ROUNDED,
}
PRUNED = ("bf16", [{"prune_experts": {"method": "frequency", "keep": 6}}, {"quantize": {"weights": "int8"}}])
STATES = ("fp16", [{"state_precision": {"ssm_state": "fp16", "conv_state": "fp16", "kv_cache": "fp16"}}])
GATHERED = {"experts": "gather", "prefill_length": 32}  # every token of a prompt has matrices of its own in memory
ENGINES = {f"{case}, {model}": (model, *of) for model in MODELS for case, of in CASES.items()} | {
    "pruned, tiny-jamba": ("tiny-jamba", *PRUNED),
    "states, tiny-nemotron-h": ("tiny-nemotron-h", *STATES),
    "gathered experts, tiny-jamba": ("tiny-jamba", *CASES["int8"], GATHERED),
    "gathered experts, tiny-nemotron-h": ("tiny-nemotron-h", *CASES["int4"], GATHERED),
}


class Engine(NamedTuple):
    folder: Path
    facts: BuildFacts
    weights: list[Weight]
    precision: str


@pytest.fixture(scope="module", autouse=True)
def _builder():
    """That of the extra, found without anybody's help."""
    with builders.installed(), pytest.MonkeyPatch.context() as patch:
        patch.delenv("LD_LIBRARY_PATH", raising=False)
        yield


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> dict[str, Engine]:
    """Made as they are asked for."""
    root = tmp_path_factory.mktemp("engines")

    class Made(dict[str, Engine]):
        def __missing__(self, name: str) -> Engine:
            self[name] = applied(root / str(len(self)), *ENGINES[name])
            return self[name]

    return Made()


def applied(folder: Path, model: str, precision: str, passes: list[dict], others: dict | None = None) -> Engine:
    folder.mkdir()
    options = {"precision": precision, "build": "required"} | (others or {})
    text = {"version": 1, "calibration": CALIBRATION, "passes": passes, "export": [{"tensorrt": options}]}
    (folder / "recipe.yaml").write_text(json.dumps(text))
    loaded = load_recipe(str(folder / "recipe.yaml"))
    report = pipeline.apply(pipeline.Job(loaded, resolve(str(SOURCES / model)), folder / "out"))
    assert report["verdict"] == "not_checked", report["audit"]
    stored = Checkpoint(folder / "out" / "checkpoint", allow_quantized=True).model
    weights = [weight for weight in stored.weights if weight.role != Role.MTP]
    return Engine(folder / "out" / "tensorrt", report["artifacts"][1]["build"], weights, precision)


def arithmetic(weight: Weight) -> float:
    """Bytes, from bits and scales of two bytes."""
    if not weight.is_quantized:
        return 2 * weight.parameters
    rows, columns = weight.shape
    group = re.search(r"-g(\d+)", weight.format)
    scales = rows * math.ceil(columns / int(group[1])) if group else rows
    return weight.parameters * (4 if weight.format.startswith("int4") else 8) / 8 + 2 * scales


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_is_as_small_as_its_formats_say(engines, name):
    engine = engines[name]
    expected, found = sum(map(arithmetic, engine.weights)), engine.facts["engine_weight_bytes"]
    assert 0.98 * expected <= found <= 1.1 * expected + 1_000_000
    assert abs(engine.facts["expected_weight_bytes"] - expected) <= 0.02 * expected
    assert (engine.folder / "model.engine").stat().st_size == engine.facts["engine_bytes"] > found


@pytest.mark.parametrize("name", ENGINES)
def test_whatever_is_quantized_stays_so_and_is_listed(engines, name):
    engine = engines[name]
    meant = {weight.name: weight.format for weight in engine.weights if weight.is_quantized}
    assert {row["tensor"]: row["format"] for row in engine.facts["layers"]} == meant
    assert {row["precision"] for row in engine.facts["layers"]} <= {"int8", "int4", "fp8"}
    assert all(row["format"].startswith(str(row["precision"])) for row in engine.facts["layers"])
    assert engine.facts["widened"] == []


@pytest.mark.parametrize("name", ENGINES)
def test_it_has_both_profiles_and_says_what_nobody_did(engines, name):
    facts = engines[name].facts
    assert (facts["builder"], facts["executed"]) == ("TensorRT-RTX", False)
    assert re.fullmatch(r"1\.7\.\d+\.\d+", facts["version"])
    assert [profile["name"] for profile in facts["profiles"]] == ["prefill", "decode"]
    assert facts["not_for"] == (["sm80", "sm86"] if name.startswith("fp8") else [])
    log = (engines[name].folder / "build.log").read_text()
    assert log.count("Total Activation Memory") == 2
    assert 0 < facts["activation_bytes"] < 1 << 28  # not what `context` tokens at once would take


@pytest.mark.parametrize("model", MODELS)
def test_inputs_that_are_rounded_are_quantized_in_the_network(engines, model):
    """A weight in int8 alone could be widened and multiplied in 16 bits."""
    for case in ROUNDED:
        name = f"{case}, {model}"
        static = sum(weight.activation is not None for weight in engines[name].weights)
        graph = reading.load(engines[name].folder / "model.onnx").graph
        assert static and any(node.op_type == "QuantizeLinear" for node in graph)


def test_a_tied_matrix_is_held_once(tmp_path):
    """Rows of it are looked up, and hidden states multiplied with all of it."""
    tied = {
        "tie_word_embeddings": True,
        "vocab_size": 12_000,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    make_jamba(tmp_path / "tied", **tied)
    engine = applied(tmp_path / "int8", str(tmp_path / "tied"), "bf16", [{"quantize": {"weights": "int8"}}])
    expected = sum(map(arithmetic, engine.weights))
    assert abs(engine.facts["engine_weight_bytes"] - expected) <= 0.02 * expected


def test_an_engine_that_is_wider_than_it_was_meant_to_be_is_found_out(engines):
    """Weights in bf16 under the names of a checkpoint in int8: by the network; and where that says nothing, by bytes."""
    plain, small = engines["bf16, tiny-jamba"], engines["int8, tiny-jamba"]
    meant = {weight.name: weight.format for weight in small.weights}
    wanted = Wanted(plain.folder / "model.onnx", "bf16", "twin", plain.facts["profiles"], meant, 0)
    facts = build(wanted, reading.load(wanted.model).graph)
    quantized = [weight.name for weight in small.weights if weight.is_quantized]
    assert sorted(facts["widened"]) == sorted(quantized)
    assert plain.facts["engine_weight_bytes"] > 1.1 * small.facts["expected_weight_bytes"] + 1_000_000


@pytest.mark.parametrize("model", MODELS)
def test_an_operator_it_does_not_have_is_told_by_its_layer(tmp_path, model):
    """The portable graph routes by NonZero."""
    path = exporting.export_checkpoint(SOURCES / model, "onnx", tmp_path / "onnx") / "model.onnx"
    job = {"model": str(path), "engine": str(tmp_path / "e"), "timings": str(tmp_path / "t"), "profiles": []}
    answer = process.run(job, tmp_path / "log", lambda share: None)
    sentence = messages.refusal(answer["refused"], reading.load(path).graph)
    assert re.match(r"layer 1: NonZero 'NonZero_\d+': it has no such operator", sentence), sentence
