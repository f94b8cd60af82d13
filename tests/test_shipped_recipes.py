"""Every shipped recipe on the reference model: briefly in every run of the tests, as shipped where `slow` ones are asked for."""

import json

import pytest
import torch
from jamba_models import load_reference
from transformers import JambaForCausalLM

from compress import resources
from compress.checkpoint.reader import Checkpoint
from compress.recipe import load_recipe

RECIPES = sorted(resources.shipped_recipes())
CALIBRATED = [name for name in RECIPES if name != "tiny-int8"]
BRIEF = ("check.samples=2", "check.length=96", "check.prompts=[heldout]")
BRIEF_CALIBRATION = ("calibration.samples=4", "calibration.length=128", "calibration.prompts=[prose]")


def apply(compress_cli, name, out, *overrides) -> dict:
    settings = [argument for override in overrides for argument in ("--set", override)]
    result = compress_cli("apply", name, "-o", out, *settings)
    assert result.exit_code == 0, result.output
    return json.loads((out / "report.json").read_text())


def most_divergence(report: dict) -> float:
    rows = [row for row in report["checks"] if row["metric"] == "kl_divergence_mean" and row["prompts"] == "all"]
    assert {(row["artifact"], row["phase"]) for row in rows} == {
        (artifact, phase) for artifact in ("checkpoint", "onnx") for phase in ("prefill", "decode")
    }
    return max(row["value"] for row in rows)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_recipe_calibrated_on_little_text_still_holds_twice_its_limit(compress_cli, tmp_path, name):
    """A hundredth of the calibration tokens: enough to find whatever is wired wrongly, which costs far more than 2 times."""
    limits = load_recipe(name).recipe.check.limits
    report = apply(compress_cli, name, tmp_path / "out", *BRIEF, *BRIEF_CALIBRATION, "check.limits={}")
    assert most_divergence(report) < 2 * limits["kl_divergence_mean"]
    assert report["calibration"]["tokens"] == 4 * 128
    assert report["calibration"]["expert_coverage"]["min_tokens"] >= 0


def test_the_recipe_that_prunes_leaves_six_of_eight_experts_to_stock_transformers(compress_cli, tiny, tmp_path):
    out = tmp_path / "out"
    report = apply(compress_cli, "prune-experts", out, *BRIEF_CALIBRATION, "check=null", "export=[]")
    (pruned,) = report["passes"]
    layers = pruned["details"]["layers"]
    assert {(entry["experts"], len(entry["kept"])) for entry in layers} == {(8, 6)}
    assert pruned["details"]["experts_after"] == 6 * len(layers)
    assert JambaForCausalLM.from_pretrained(out / "checkpoint").config.num_experts == 6
    ids = torch.arange(3, 74)[None]
    with torch.inference_mode():
        whole, smaller = (load_reference(folder)(ids).logits.log_softmax(-1) for folder in (tiny, out / "checkpoint"))
        divergence = float((whole.exp() * (whole - smaller)).sum(-1).mean())
    assert 0 < divergence < 0.1  # 0.015 when this was written; 0.8 with two rows of every router swapped


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_its_limits_as_shipped(compress_cli, tmp_path, name):
    report = apply(compress_cli, name, tmp_path / "out")
    assert report["verdict"] == "pass"
    formats = json.loads((tmp_path / "out" / "manifest.json").read_text())["tensors"]["checkpoint"]
    held = Checkpoint(tmp_path / "out" / "checkpoint", allow_quantized=True).model.weights
    assert {weight.name: weight.format for weight in held} == formats
