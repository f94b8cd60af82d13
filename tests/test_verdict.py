"""What a verdict means: without a limit none, with a figure that is not a number always `fail`; JSON without NaN."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refusal, refusal_of_command
from safetensors.torch import load_file, save_file

from compress.check.compare import Row, verdict
from compress.check.metrics import Scores, score, summarize
from compress.recipe.recipe import load_recipe
from compress.report import folded, measures
from compress.runtime.artifacts import open_artifact
from compress.strict import json_text
from compress.studies import generation

QUICK = ("--prompts", "self", "--samples", "2", "--length", "12")
QUICK_APPLY = ("--set", "check.prompts=[self]", "--set", "check.samples=1", "--set", "check.length=8")


def strict(text: str) -> dict:
    """JSON without the words that Python reads and JSON does not have."""

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def overflowing(small, tmp_path_factory) -> Path:
    """The small model with finite weights whose products are not: every logit is NaN."""
    folder = Path(shutil.copytree(small, tmp_path_factory.mktemp("overflowing") / "model"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = torch.full_like(tensor, 3e38).copysign(tensor)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def row(value: float, limit: float | None = None, metric: str = "kl_divergence_mean") -> Row:
    return Row("onnx", metric, "prefill", "all", value, 10, limit)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "not_checked"),
        ([row(0.1)], "not_checked"),
        ([row(0.1), row(0.1, 0.2)], "pass"),
        ([row(0.1, 0.2), row(0.3, 0.2)], "fail"),
        ([row(float("nan"))], "fail"),
        ([row(float("inf"))], "fail"),
        ([row(float("nan"), 0.2)], "fail"),
        ([row(float("-inf"), 0.2)], "fail"),
        ([row(float("nan"), 0.5, "top1_agreement")], "fail"),
        ([row(float("inf"), 0.5, "top1_agreement")], "fail"),
        ([row(0.1, 0.2), row(float("nan"))], "fail"),
    ],
    ids=str,
)
def test_the_verdict(rows, expected):
    assert verdict(rows) == expected
    assert all(one.passed is not True for one in rows if not np.isfinite(one.value))


def test_logits_that_are_no_numbers_give_figures_that_are_none():
    log_p = torch.log_softmax(torch.randn(5, 7), -1)
    logits = torch.randn(5, 7)
    logits[3, 2] = float("nan")
    values = summarize(score(log_p, logits, torch.tensor([0, 1, 2, 3, 4])))
    assert not np.isfinite(
        [values["kl_divergence_mean"], values["kl_divergence_p99"], values["perplexity_ratio"]]
    ).any()


@pytest.mark.filterwarnings("error")
def test_a_perplexity_beyond_every_number_is_no_warning_but_infinite():
    scores = Scores(np.zeros(3), np.full(3, 1000.0), np.full(3, 1000.0), np.zeros(3, bool))
    assert summarize(scores)["perplexity_ratio"] == float("inf")


def test_a_check_without_limits_is_not_checked(compress_cli, tiny, applied, small):
    result = compress_cli("check", small, small, *QUICK, "--json", "-")
    assert result.exit_code == 0
    assert strict(result.stdout)["verdict"] == "not_checked"
    assert "no limits were set" in result.stderr
    assert "pass" not in result.stderr


def test_an_apply_without_limits_is_not_checked(compress_cli, small, tmp_path):
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", *QUICK_APPLY, "--set", "check.limits={}")
    result = compress_cli(*arguments)
    assert result.exit_code == 0, result.output
    assert strict((tmp_path / "out" / "report.json").read_text())["verdict"] == "not_checked"
    for text in (result.stdout, (tmp_path / "out" / "report.md").read_text()):
        assert "not checked, no limits were set" in text


@pytest.mark.parametrize("limit", [(), ("--limit", "perplexity_ratio=1000"), ("--limit", "top1_agreement=0")])
def test_a_candidate_that_gives_nan_fails_with_and_without_limits(compress_cli, small, overflowing, tmp_path, limit):
    result = compress_cli("check", small, overflowing, *QUICK, *limit, "--json", tmp_path / "rows.json")
    assert result.exit_code == 1, result.output
    document = strict((tmp_path / "rows.json").read_text())
    assert document["verdict"] == "fail"
    values = {row["value"] for row in document["checks"] if row["metric"] != "top1_agreement"}
    assert values == {None}
    assert all(row["passed"] is False for row in document["checks"] if row["limit"] and row["value"] is None)
    assert "not finite" in result.stderr
    assert "Warning" not in result.stderr


def test_json_on_stdout_holds_no_nan(compress_cli, small, overflowing):
    assert strict(compress_cli("check", small, overflowing, *QUICK, "--json", "-").stdout)["verdict"] == "fail"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_of_a_model_that_gives_nan_is_refused(overflowing, temperature):
    artifact = open_artifact(overflowing)
    assert "NaN" in refusal(lambda: list(generation.stream_tokens(artifact, [1], 2, temperature, 0)))


def test_a_report_shows_what_is_not_finite():
    entry = row(float("nan")).to_json()
    assert entry["value"] is None
    assert "**not finite**" in folded.of(measures.checks([entry]))


def test_json_is_written_without_what_json_does_not_have():
    values = {"a": float("nan"), "b": [1.5, float("inf"), {"c": (float("-inf"), "NaN", None, True, np.float64("nan"))}]}
    assert strict(json_text.dumps(values)) == {"a": None, "b": [1.5, None, {"c": [None, "NaN", None, True, None]}]}


UNREACHABLE = ["top1_agreement=97", "top1_agreement=1.0001", "perplexity_ratio=0"]


@pytest.mark.parametrize("limit", UNREACHABLE)
def test_a_limit_that_no_value_can_meet_is_refused(compress_cli, small, tmp_path, limit):
    metric, value = limit.split("=")
    assert metric in refusal_of_command(compress_cli("check", small, small, *QUICK, "--limit", limit))
    (tmp_path / "limits.yaml").write_text(f"{metric}: {value}\n")
    said = refusal_of_command(compress_cli("check", small, small, *QUICK, "--limits", tmp_path / "limits.yaml"))
    assert metric in said
    assert "limits.yaml" in said


@pytest.mark.parametrize("limit", UNREACHABLE)
def test_a_recipe_with_such_a_limit_is_refused_with_its_line(tmp_path, limit):
    metric, value = limit.split("=")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\ncheck:\n  limits:\n    kl_divergence_mean: 0.1\n    {metric}: {value}\n")
    assert f"recipe.yaml:5: check.limits.{metric}: no value can" in refusal(lambda: load_recipe(str(recipe)))


@pytest.mark.parametrize(
    "limit", ["top1_agreement=1", "top1_agreement=0", "kl_divergence_mean=0", "perplexity_ratio=1"]
)
def test_a_limit_that_a_perfect_candidate_meets_is_taken(tmp_path, limit):
    metric, value = limit.split("=")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\ncheck:\n  limits: {{{metric}: {value}}}\n")
    assert load_recipe(str(recipe)).recipe.check.limits == {metric: float(value)}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "NaN"])
def test_a_temperature_that_is_no_number_is_refused(compress_cli, tiny, value):
    assert "temperature" in refusal_of_command(compress_cli("run", tiny, "a", "--temperature", value))
