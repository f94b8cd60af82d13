"""The card of a compressed checkpoint: what the hub reads of it, what a person can do with it, and what it must not claim."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from compress.apply import pipeline
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

CARD = (
    "---\nlicense: other\nlicense_name: own\ntags: [letters]\n---\n# A model\n\nIt was trained on letters, ü and all.\n"
)
BRIEF = ("check.samples=1", "check.length=32", "check.prompts=[self]")


def made(source: Path, out: Path, *overrides: str, recipe: str = "tiny-int8") -> tuple[str, dict]:
    """The card's text, and report.json."""
    pipeline.apply(pipeline.Job(load_recipe(recipe, overrides), resolve(str(source)), out))
    text = (out / "checkpoint" / "README.md").read_text(encoding="utf-8")
    return text, json.loads((out / "report.json").read_text())


def with_card(small: Path, folder: Path, card: str) -> Path:
    model = Path(shutil.copytree(small, folder))
    (model / "README.md").write_text(card, encoding="utf-8")
    return model


def test_the_hub_reads_licence_base_model_library_and_formats(small, tmp_path):
    text, _ = made(with_card(small, tmp_path / "model", CARD), tmp_path / "out", "check=null", "export=[]")
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.library_name) == ("other", "model", "transformers")
    assert data.to_dict()["license_name"] == "own"
    assert {"jamba", "int8", "bf16"} <= set(data.tags) and "letters" not in data.tags


def test_the_originals_card_is_quoted_below_and_not_on_top(small, tmp_path):
    text, _ = made(with_card(small, tmp_path / "model", CARD), tmp_path / "out", "check=null", "export=[]")
    body = ModelCard(text).text
    assert body.lstrip().startswith("# model, compressed")
    own, _, original = body.partition("## The original's card")
    assert "> # A model\n>\n> It was trained on letters, ü and all." in original
    assert "letters" not in own and "license" not in original
    assert "weights: int8" in own, "the recipe stands in the card"


@pytest.mark.parametrize("card", ["---\nlicense: [mit\n---\n# Damaged\n", "---\n- a\n---\n# Damaged\n", "# Damaged\n"])
def test_a_card_whose_front_matter_is_damaged_is_only_quoted(small, tmp_path, card):
    text, _ = made(with_card(small, tmp_path / "model", card), tmp_path / "out", "check=null", "export=[]")
    assert "> # Damaged" in text and ModelCard(text).data.license is None


def test_the_figures_are_those_of_the_report(small, tmp_path):
    text, report = made(small, tmp_path / "out", *BRIEF)
    shown = ("perplexity_ratio", "kl_divergence_mean", "kl_divergence_p99", "top1_agreement")
    rows = [row for row in report["checks"] if row["prompts"] == "all" and row["metric"] in shown]
    assert len(rows) == 16
    for row in rows:
        assert f"| {row['artifact']} | {row['phase']} | {row['metric']} | {row['value']:.6g} |" in text
    assert f"Verdict: {report['verdict']}" in text


def test_without_a_check_it_claims_nothing(small, tmp_path):
    text, _ = made(small, tmp_path / "out", "check=null", "export=[]")
    assert "Nothing: no check was asked for." in text and "Verdict" not in text


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_every_snippet_loads_the_model(small, tmp_path):
    text, _ = made(small, tmp_path / "out", "check=null", "export=[]")
    assert len(snippets(text)) == 2, "stock transformers and compress.load"
    for snippet in snippets(text):
        values = {"folder": str(tmp_path / "out" / "checkpoint")}
        exec(snippet, values)  # what a reader would paste
        assert values["model"](torch.tensor([[1, 5, 7]]), use_cache=False).logits.shape == (1, 3, 67)


def test_what_transformers_needs_beside_itself_is_said_where_it_does(small, tmp_path):
    text, _ = made(small, tmp_path / "int8", "check=null", "export=[]")
    assert "after `pip install compressed-tensors`:\n\n```python\nimport torch\n" in text
    text, _ = made(small, tmp_path / "plain", "check=null", "export=[]", "passes=[]")
    assert "compressed-tensors" not in text


@pytest.mark.parametrize("layout", ["genai", "transformers.js"])
def test_every_runtime_of_an_export_has_a_snippet(small, tmp_path, layout):
    text, report = made(small, tmp_path / "out", "check=null", f"export=[onnx: {{layout: {layout}}}]")
    for row in report["runtimes"]:
        assert f"With {row['name']}" in text
    path = report["artifacts"][1]["path"]
    assert f"has `{path}` too" in text
    (snippet,) = (found for found in snippets(text) if "import onnxruntime\n" in found)
    values = {"output": str(tmp_path / "out")}
    exec(snippet, values)  # what a reader would paste
    assert values["session"].get_outputs()[0].name == "logits"
    folder = 'onnxruntime_genai.Model(f"{output}/onnx")' if layout == "genai" else "(`${output}/onnx`)"
    assert folder in text


def test_a_runtime_that_cannot_load_it_gets_a_reason_and_no_snippet(small, tmp_path):
    rotated = "passes.0.quantize={method: rtn, weights: int8, activations: dynamic-int8, rotate: [mlp]}"
    text, report = made(small, tmp_path / "out", rotated, "check=null", "export=[]")
    assert len(snippets(text)) == 1 and ModelCard(text).data.library_name == "compress"
    (refused,) = (row for row in report["runtimes"] if not row["loads"])
    assert f"transformers does not load it: {refused['why']}." in text
