"""Every shipped recipe on the reference model: briefly in every run of the tests, as shipped where `slow` ones are asked for."""

import json
from pathlib import Path

import pytest
import torch
from jamba_models import TIED, WHOLE_MODEL, load_reference, make_whole_model
from refusals import refusal_of_command
from transformers import JambaForCausalLM

from compress.check.default_limits import limits
from compress.check.expected import expected
from compress.checkpoint.reader import Checkpoint
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.runtime.artifacts import find_artifact, open_artifact

EMBEDDING = "model.embed_tokens.weight"
RECIPES = sorted(resources.shipped_recipes())
SEARCHED = "state-auto"  # which covers no experts, and needs long windows for its metric
CALIBRATED = [name for name in RECIPES if name not in ("tiny-int8", "state-int8", SEARCHED)]
WEIGHTS_AS_THEY_CAME = ("state-int8", SEARCHED, "tensorrt-fp16")
NO_ENGINE = "export.0.tensorrt.build=never"  # whatever is installed
BRIEF = ("check.samples=2", "check.length=96", "check.prompts=[heldout]")
BRIEF_CALIBRATION = ("calibration.samples=4", "calibration.length=128", "calibration.prompts=[prose]")
TWO_WINDOWS = ("calibration.samples=2", "calibration.length=256", "calibration.prompts=[prose]")
SHORT_WINDOWS = ("calibration.samples=2", "calibration.length=32", "calibration.prompts=[prose]",
                 "passes.0.state_precision.auto.metric=kl_divergence_mean")  # fmt: skip
# the divergence of random weights; a table that is rounded for other inputs, or a head whose input is
# rounded on another grid than its weights, costs ten times as much
TIED_MOST = {"int8": 0.01, "tiny-int8": 0.01, "int8-w8a8": 0.02, "fp8-dynamic": 0.1, "fp8-static": 0.1, "mixed": 0.1,
             "tensorrt-fp16": 0.01, "tensorrt-fp8": 0.1, "tensorrt-int8": 0.02,
             "int4-gptq": 0.2, "prune-experts": 1.0, "state-int8": 0.01, "state-auto": 0.1}  # fmt: skip


def as_arguments(name, *overrides) -> list[str]:
    overrides = (*overrides, NO_ENGINE) if name.startswith("tensorrt-") else overrides
    return [argument for override in overrides for argument in ("--set", override)]


def apply(compress_cli, name, out, *overrides, model=None) -> dict:
    settings = as_arguments(name, *overrides)
    settings += ["-m", model] if model else []
    result = compress_cli("apply", name, "-o", out, *settings)
    assert result.exit_code == 0, result.output
    return json.loads((out / "report.json").read_text())


def most_divergence(report: dict) -> float:
    rows = [row for row in report["checks"] if row["metric"] == "kl_divergence_mean" and row["prompts"] == "all"]
    assert {(row["artifact"], row["phase"]) for row in rows} == {
        (artifact["kind"], phase) for artifact in report["artifacts"] for phase in ("prefill", "decode")
    }
    return max(row["value"] for row in rows)


def most_allowed(name: str, model: Path, out: Path) -> float:
    """The divergence that the recipe's limits allow, of the artifact that is allowed more."""
    check = load_recipe(name).recipe.check
    if not check.limited_by_default:
        return check.limits["kl_divergence_mean"]
    original, artifacts = (
        open_artifact(model),
        (
            open_artifact(find_artifact(path))
            for path in (out / "checkpoint", out / "onnx", out / "tensorrt")
            if path.is_dir()
        ),
    )
    return max(limits(expected(original, artifact))["kl_divergence_mean"] for artifact in artifacts)


@pytest.mark.parametrize("name", CALIBRATED)
def test_a_recipe_calibrated_on_little_text_still_holds_twice_its_limit(compress_cli, tiny, tmp_path, name):
    """A hundredth of the calibration tokens: enough to find whatever is wired wrongly, which costs far more than 2 times."""
    report = apply(compress_cli, name, tmp_path / "out", *BRIEF, *BRIEF_CALIBRATION, "check.limits={}")
    assert most_divergence(report) < 2 * most_allowed(name, tiny, tmp_path / "out")
    assert report["calibration"]["tokens"] == 4 * 128
    if options_of(name) is not None:  # what only an export asked for is counted by no expert
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


@pytest.fixture(scope="module")
def make_model(tmp_path_factory, tiny):
    """A random model with the shipped tokenizer."""

    def make(**changes) -> Path:
        return make_whole_model(tmp_path_factory.mktemp("model") / "random", tiny, **changes)

    return make


@pytest.fixture(scope="module")
def tied(make_model) -> Path:
    return make_model(**TIED)


def little_text(name: str) -> tuple[str, ...]:
    if name == SEARCHED:
        return SHORT_WINDOWS
    return TWO_WINDOWS if name in CALIBRATED else ()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_a_model_whose_embeddings_are_tied(compress_cli, tied, tmp_path, name):
    calibration = little_text(name)
    report = apply(compress_cli, name, tmp_path / "out", *BRIEF, *calibration, "check.limits={}", model=tied)
    assert_fits_a_tied_model(name, report, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_in_full_on_a_model_whose_embeddings_are_tied(compress_cli, tied, tmp_path, name):
    report = apply(compress_cli, name, tmp_path / "out", "check.limits={}", model=tied)
    assert_fits_a_tied_model(name, report, tmp_path / "out")


def options_of(name: str):
    """Of the first pass, where there is one."""
    return next((step.options for step in load_recipe(name).recipe.passes), None)


def assert_fits_a_tied_model(name: str, report: dict, out: Path) -> None:
    """The divergence is small; the table has the format, and its input the one, that the recipe gives an output matrix."""
    assert most_divergence(report) < TIED_MOST[name]
    options = options_of(name)
    table = Checkpoint(out / "checkpoint", allow_quantized=True).model.unit("embedding").weights[EMBEDDING]
    if name == "prune-experts":
        assert table.format == "bf16"
        assert {(entry["experts"], len(entry["kept"])) for entry in report["passes"][0]["details"]["layers"]} == {
            (4, 3)
        }
        return
    if name in WEIGHTS_AS_THEY_CAME:
        assert table.format == "bf16"
        return
    activation = options.activation_of("lm_head")
    assert (table.format, table.activation.format if table.activation else "none") == (
        options.format_of("lm_head"), activation)  # fmt: skip
    said = "'lm_head' means the embedding" in (out / "report.md").read_text()
    assert said == ("lm_head" in options.roles)
    assert "rounded_to_nearest" not in report["passes"][0]["details"]


STATES_OF = {kind: lambda layer, kind=kind: any(spec.kind == kind for spec in layer.states)
             for kind in ("ssm_state", "conv_state", "kv_cache")}  # fmt: skip
LACKING = {
    "no experts": {"num_experts": 1},
    "nothing but experts": {"expert_layer_period": 1, "expert_layer_offset": 0},
    "no attention": {"attn_layer_period": 50, "attn_layer_offset": 49},
    "nothing but attention": {"attn_layer_period": 1, "attn_layer_offset": 0},
    "sizes that no power of two divides": {"hidden_size": 45, "intermediate_size": 55, "mamba_d_state": 5},
    "no experts, tied": {"num_experts": 1, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("lacking", LACKING.values(), ids=list(LACKING))
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("int8", "fp8-dynamic")])  # as others here
def test_a_recipe_runs_on_a_model_that_lacks_what_it_names(compress_cli, make_model, tmp_path, name, lacking):
    """Everything but the check; what is named and not there is said."""
    model = make_model(**WHOLE_MODEL | {"num_experts": 4} | lacking)
    calibration = little_text(name)
    settings = as_arguments(name, "check=null", *calibration)
    result = compress_cli("apply", name, "-m", model, "-o", tmp_path / "out", *settings)
    if name == "prune-experts" and lacking.get("num_experts") == 1:
        assert "the model has no experts" in refusal_of_command(result)
        return
    assert result.exit_code == 0, result.output
    report = (tmp_path / "out" / "report.md").read_text()
    roles = {weight.role for weight in Checkpoint(model).model.weights}
    options = options_of(name)
    for kind, has in STATES_OF.items():
        lacks = getattr(options, kind, None) is not None and not any(map(has, Checkpoint(model).model.layers))
        assert (f"'{kind}' is named, but" in report) == lacks
    named = {*getattr(options, "roles", ()), *getattr(options, "rotate", ()), *getattr(options, "activation_roles", ())}
    for role in named - roles - {"lm_head"}:
        assert f"'{role}' is named in" in report
    assert ("not rotated" in report) == (name in ("int8-w8a8", "tensorrt-int8") and "hidden_size" in lacking)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_its_limits_as_shipped(compress_cli, tmp_path, name):
    report = apply(compress_cli, name, tmp_path / "out")
    assert report["verdict"] == "pass"
    formats = json.loads((tmp_path / "out" / "manifest.json").read_text())["tensors"]["checkpoint"]
    held = Checkpoint(tmp_path / "out" / "checkpoint", allow_quantized=True).model.weights
    assert {weight.name: weight.format for weight in held} == formats


# Nemotron-H

EVENLY_USED = 0.2  # most divergence of a quarter of experts removed, each of which sees a quarter of the tokens


@pytest.mark.parametrize("name", ["int4-gptq", "int8-w8a8", "prune-experts"])
def test_a_recipe_calibrated_on_little_text_runs_on_nemotron_h(compress_cli, nemotron, tmp_path, name):
    report = apply(compress_cli, name, tmp_path / "out", *BRIEF, *TWO_WINDOWS, "check.limits={}", model=nemotron)
    most = EVENLY_USED if name == "prune-experts" else 2 * most_allowed(name, nemotron, tmp_path / "out")
    assert most_divergence(report) < most


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name != "prune-experts"])
def test_a_recipe_holds_its_limits_on_nemotron_h(compress_cli, nemotron, tmp_path, name):
    """But for the one that prunes: experts that training kept evenly used are not spared so cheaply."""
    assert apply(compress_cli, name, tmp_path / "out", model=nemotron)["verdict"] == "pass"
