"""What is said about runtimes before the work, from a plan alone. Whether it is true is tested where the runtimes run:
tests/compilers, and tests/test_load.py for stock transformers."""

import json
from pathlib import Path

import pytest
from jamba_models import make_jamba
from pruned_models import Pruning, prune

from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime import runtimes

FIT = {
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "mamba_dt_rank": 32,
}
REFUSED_BY_STOCK = {"int8-w8a8", "int4-gptq"}  # int8 beside rounded inputs; more than one format outside the experts


def rows(recipe: str, source, *overrides: str) -> dict[tuple[str, str], runtimes.Runtime]:
    loaded = load_recipe(recipe, overrides)
    planned = pipeline.prepare(pipeline.Job(loaded, resolve(str(source)), source / "never"), needs_weights=False)
    return {(row.artifact, row.name): row for row in runtimes.of(planned.result, loaded.recipe.export)}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_jamba(tmp_path_factory.mktemp("tied") / "model", tie_word_embeddings=True, **FIT)


def quantized(weights: str, **more) -> tuple[str, ...]:
    return ("check=null", f"passes.0.quantize={json.dumps({'weights': weights, **more})}")


@pytest.mark.parametrize("name", sorted(resources.shipped_recipes()))
def test_every_shipped_recipe_is_told_for_every_runtime(tiny, name):
    found = rows(name, tiny)
    of_checkpoint = {("checkpoint", "transformers"), ("checkpoint", "compress.load")}
    if name.startswith("tensorrt-"):
        assert set(found) == of_checkpoint | {("tensorrt", "tensorrt-rtx")}
        return
    assert set(found) == of_checkpoint | {
        ("onnx", runtime) for runtime in ("onnxruntime", "onnxruntime-genai", "openvino")
    }
    assert found["checkpoint", "transformers"].loads == (name not in REFUSED_BY_STOCK | {"mixed"})
    assert all(row.loads for (artifact, _), row in found.items() if artifact == "onnx")
    keeps_bfloat16 = name.startswith("state-")  # which its Python interface did not hand over before
    assert found["onnx", "onnxruntime"].minimum == ("1.20" if keeps_bfloat16 else "1.19")


def test_a_row_is_that_of_the_contract(tiny):
    row = rows("int8-w8a8", tiny)["checkpoint", "transformers"].to_json()
    assert set(row) == {"artifact", "name", "minimum", "loads", "why"}
    assert row["loads"] is False and "rotated" in row["why"]
    assert json.loads(json.dumps(row)) == row


def test_an_int4_table_raises_the_floor(tied):
    of = {
        weights: rows("tiny-int8", tied, *quantized(weights))["onnx", "onnxruntime"].minimum
        for weights in ("int8", "int4-g32")
    }
    assert of == {"int8": "1.19", "int4-g32": "1.23"}


def test_blocks_that_do_not_divide_the_inputs_stop_openvino(tied):
    found = rows("tiny-int8", tied, *quantized("fp8-e4m3-b128"))["onnx", "openvino"]
    assert not found.loads and "128" in found.why


def test_the_layout_decides_who_looks_for_the_files(tiny):
    found = rows("tiny-int8", tiny, "export=[{onnx: {layout: transformers.js}}]")
    assert ("onnx", "transformers.js") in found and ("onnx", "onnxruntime-genai") not in found


def test_without_an_export_only_the_checkpoint_is_told(tiny):
    assert {artifact for artifact, _ in rows("tiny-int8", tiny, "export=[]", "check=null")} == {"checkpoint"}


@pytest.mark.parametrize(
    "pruning", [Pruning({1: (0, 2), 4: (0, 1, 2)}), Pruning({1: (0, 2), 4: (1, 2)}, rows_stay=True)]
)
def test_layers_that_differ_stop_stock_transformers(tmp_path, small, pruning):
    folder = prune(small, tmp_path / "pruned", pruning)
    stock, ours = runtimes.of_checkpoint(Checkpoint(folder).model)
    assert not stock.loads and "experts" in stock.why and ours.loads


def test_layers_pruned_alike_do_not(tmp_path, small):
    folder = prune(small, tmp_path / "pruned", Pruning({1: (0, 2), 4: (1, 2)}))
    assert runtimes.of_checkpoint(Checkpoint(folder).model)[0].loads


def test_the_dry_run_and_the_report_say_which_runtimes_load_what(compress_cli, small, tmp_path):
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", "--set", "check=null")
    rotated = ("--set", "passes.0.quantize={weights: int8, activations: dynamic-int8, rotate: [mlp]}")
    planned = compress_cli(*arguments, "--dry-run", *rotated).stdout
    assert "loads in  checkpoint: compress.load; not transformers: matrices are stored rotated" in planned
    assert "loads in  onnx: onnxruntime 1.19, onnxruntime-genai 0.18, openvino 2026.4" in planned
    assert compress_cli(*arguments, *rotated).exit_code == 0
    rows = json.loads((tmp_path / "out" / "report.json").read_text())["runtimes"]
    assert [(row["artifact"], row["name"], row["loads"]) for row in rows] == [
        ("checkpoint", "transformers", False), ("checkpoint", "compress.load", True), ("onnx", "onnxruntime", True),
        ("onnx", "onnxruntime-genai", True), ("onnx", "openvino", True),
    ]  # fmt: skip
    assert all((row["why"] is None) == row["loads"] for row in rows)


@pytest.mark.parametrize("name", resources.shipped_recipes())
def test_the_readme_says_what_is_computed(tiny, name):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    table = text[text.index("| recipe | what it does |") :]
    line = next(line for line in table.splitlines() if line.startswith(f"| `{name}` |"))
    by_artifact = {}
    for runtime in rows(name, tiny).values():
        by_artifact.setdefault(runtime.artifact, []).extend([runtime.title] if runtime.loads else [])
    assert line.endswith(f"| {'; '.join(', '.join(titles) for titles in by_artifact.values())} |")
