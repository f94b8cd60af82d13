"""What a verdict means: without a limit none, with a figure that is not a number always `fail`; JSON without NaN."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refusal, refusal_of_command
from safetensors.torch import load_file, save_file

from compress.check.compare import Found, Row, verdict
from compress.check.metrics import Scores, score, summarize
from compress.recipe.recipe import load_recipe
from compress.report import folded, measures, terminal, words
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


def row(
    value: float | None, limit: float | None = None, metric: str = "kl_divergence_mean", reach: float = 0.05
) -> Row:
    """With an interval of `reach` to both sides."""
    low, high = (None, None) if value is None else (value - reach, value + reach)
    return Row("onnx", metric, "prefill", "all", value, 10, limit, low, high)


HELD, MISSED, UNDECIDED, UNMEASURED = row(0.1, 0.2), row(0.3, 0.2), row(0.18, 0.2), row(None, 0.2)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "not_checked"),
        ([row(0.1)], "not_checked"),
        ([row(0.1), HELD], "pass"),
        ([HELD, MISSED], "fail"),
        ([HELD, UNDECIDED], "undecided"),
        ([UNDECIDED, MISSED], "fail"),
        ([HELD, UNMEASURED], "not_checked"),
        ([UNDECIDED, UNMEASURED], "undecided"),
        ([row(float("nan"))], "fail"),
        ([row(float("inf"))], "fail"),
        ([row(float("nan"), 0.2)], "fail"),
        ([row(float("-inf"), 0.2)], "fail"),
        ([row(float("nan"), 0.5, "top1_agreement")], "fail"),
        ([row(float("inf"), 0.5, "top1_agreement")], "fail"),
        ([HELD, row(float("nan"))], "fail"),
        ([UNDECIDED, row(float("nan"))], "fail"),
    ],
    ids=str,
)
def test_the_verdict(rows, expected):
    assert verdict(Found(rows)) == expected
    assert all(one.passed is not True for one in rows if one.value is not None and not np.isfinite(one.value))


@pytest.mark.parametrize("rows", [[], [HELD], [UNDECIDED]], ids=str)
@pytest.mark.parametrize("part", ["audit", "layer_audit"])
def test_what_the_audit_finds_fails_whatever_the_limits_say(rows, part):
    good, bad = (
        {"artifact": "onnx", "tensor": "a", "layer": 3, "block": "moe", "expert": None, "matrix": None, "passed": is_so}
        for is_so in (True, False)
    )
    assert verdict(Found(rows, **{part: [good, good]})) == verdict(Found(rows))
    found = Found(rows, **{part: [good, bad]})
    assert verdict(found) == "fail"
    assert words.verdict_words("fail", found.facts()).startswith("fail, the audit found ")


# --- a limit and an interval


@pytest.mark.parametrize(("metric", "value", "low", "high", "limit", "expected"), [
    ("kl_divergence_mean", 0.2, 0.1, 0.3, 0.31, "held"),
    ("kl_divergence_mean", 0.2, 0.1, 0.3, 0.3, "held"),  # touching is within
    ("kl_divergence_mean", 0.2, 0.1, 0.3, 0.29, "undecided"),
    ("kl_divergence_mean", 0.2, 0.1, 0.3, 0.2, "undecided"),
    ("kl_divergence_mean", 0.2, 0.1, 0.3, 0.15, "undecided"),
    ("kl_divergence_mean", 0.2, 0.1, 0.3, 0.1, "undecided"),
    ("kl_divergence_mean", 0.2, 0.1, 0.3, 0.09, "missed"),
    ("top1_agreement", 0.9, 0.8, 0.95, 0.8, "held"),
    ("top1_agreement", 0.9, 0.8, 0.95, 0.81, "undecided"),
    ("top1_agreement", 0.9, 0.8, 0.95, 0.95, "undecided"),
    ("top1_agreement", 0.9, 0.8, 0.95, 0.96, "missed"),
    ("perplexity_ratio", 1.0, 1.0, 1.0, 1.0, "held"),  # windows that agree
    ("kl_divergence_mean", 0.0, 0.0, 0.0, 0.0, "held"),
    ("top1_agreement", 1.0, 1.0, 1.0, 1.0, "held"),
    ("kl_divergence_mean", 0.1, 0.1 + 1e-17, 0.1 + 2e-17, 0.1, "held"),  # sums in another order
    ("kl_divergence_mean", 0.3, 0.1, 0.2, 0.25, "undecided"),  # an interval that leaves its value out
    ("kl_divergence_mean", 0.2, 0.0, 0.9, 0.0, "missed"),  # one divergence is enough for a mean above 0
    ("top1_agreement", 0.99, 0.9, 1.0, 1.0, "missed"),
    ("kl_divergence_mean", 0.2, None, None, 0.0, "missed"),
    ("kl_divergence_mean", 0.0, None, None, 0.0, "undecided"),
    ("kl_divergence_mean", 0.01, None, None, 0.3, "undecided"),
    ("kl_divergence_mean", 5.0, None, None, 0.3, "undecided"),
    ("top1_agreement", float("nan"), None, None, 0.0, "missed"),
])  # fmt: skip
def test_a_limit_is_held_or_missed_where_the_whole_interval_says_so(metric, value, low, high, limit, expected):
    one = Row("onnx", metric, "decode", "all", value, 100, limit, low, high, tokens=100)
    facts = one.to_json()
    assert (facts["outcome"], facts["passed"]) == (expected, expected == "held")
    assert verdict(Found([one])) == {"held": "pass", "missed": "fail"}.get(expected, expected)
    if expected != "undecided":
        assert facts["more_tokens"] is None


def test_rows_without_a_limit_or_without_a_value_have_no_outcome():
    for one in (row(0.1), row(None), UNMEASURED):
        facts = one.to_json()
        assert (facts["outcome"], facts["passed"], facts["more_tokens"]) == (None, None, None)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("narrowing", [0.5, 1.0])
def test_so_much_more_text_settles_it_and_less_does_not(sign, narrowing):
    """Draws the interval of more tokens, as wide as so many make it, and asks again."""
    value, limit, reach, tokens = 0.2, 0.2 + sign * 0.03, 0.1, 5_000

    def outcome_of(more: int) -> Row:
        width = reach * (tokens / (tokens + more)) ** narrowing
        return Row("onnx", "kl_divergence_mean", "decode", "all", value, 1, limit, value - width, value + width,
                   tokens=tokens, narrowing=narrowing)  # fmt: skip

    more = outcome_of(0).more_tokens
    assert more == pytest.approx(tokens * ((10 / 3) ** (1 / narrowing) - 1), abs=1)
    assert outcome_of(more - 10).outcome == "undecided"
    assert outcome_of(more + 10).outcome == ("held" if sign > 0 else "missed")


def test_no_amount_of_text_settles_a_value_on_its_limit():
    facts = Row("onnx", "kl_divergence_mean", "decode", "all", 0.2, 1, 0.2, 0.1, 0.3, tokens=100).to_json()
    assert (facts["outcome"], facts["more_tokens"]) == ("undecided", None)
    assert "no amount of text would settle" in words.outcome_words(facts)
    near = Row("onnx", "kl_divergence_mean", "decode", "all", 0.2, 1, 0.2 + 1e-9, 0.1, 0.3, tokens=100).to_json()
    assert near["more_tokens"] is None


def test_people_read_how_many_more_tokens():
    facts = Row("onnx", "kl_divergence_mean", "decode", "all", 0.2, 1, 0.25, 0.1, 0.3, tokens=4_113).to_json()
    assert facts["more_tokens"] == 3 * 4_113
    for text in (words.outcome_words(facts), folded.of(measures.checks([facts]))):
        assert "undecided (about 12,000 more tokens would settle it)" in text


def test_the_verdict_in_words_names_what_was_missed_and_then_what_is_undecided():
    rows = [row(0.19, 0.2, "perplexity_ratio"), HELD, MISSED, row(0.4, 0.2, "kl_divergence_p99"), row(float("inf"))]
    said = words.verdict_words("fail", Found(rows).facts())
    assert said == (
        "fail, not every figure is finite; missed kl_divergence_mean (onnx, prefill: 0.3, limit 0.2) and 1 more; "
        "too little text to settle perplexity_ratio (onnx, prefill: 0.19, limit 0.2)"
    )
    assert words.verdict_words("pass", Found([HELD]).facts()) == "pass"


@pytest.mark.parametrize(("verdict_of", "on_undecided", "code"), [
    ("pass", "fail", 0), ("not_checked", "fail", 0), ("undecided", "fail", 1), ("undecided", "pass", 0),
    ("fail", "pass", 1), ("fail", "fail", 1),
])  # fmt: skip
def test_exit_codes(verdict_of, on_undecided, code):
    assert terminal.exit_code(verdict_of, on_undecided) == code


UNDECIDABLE = ("--prompts", "self", "--samples", "1", "--length", "12", "--limit", "kl_divergence_mean=0.5")


@pytest.mark.parametrize(
    ("option", "code"), [((), 1), (("--on-undecided", "fail"), 1), (("--on-undecided", "pass"), 0)]
)
def test_a_single_window_settles_nothing_and_says_what_would(compress_cli, small, option, code):
    result = compress_cli("check", small, small, *UNDECIDABLE, *option, "--json", "-")
    assert result.exit_code == code, result.stderr
    document, said = strict(result.stdout), " ".join(result.stderr.split())
    assert document["verdict"] == "undecided"
    assert {row["outcome"] for row in document["checks"] if row["limit"]} == {"undecided"}
    assert "verdict: undecided, too little text to settle kl_divergence_mean" in said
    assert "a single window, which tells no interval; more text or a smaller 'length'" in said


@pytest.mark.parametrize(("setting", "code"), [("fail", 1), ("pass", 0)])
def test_a_recipe_says_what_becomes_of_the_undecided(compress_cli, small, tmp_path, setting, code):
    settings = ("--set", "check.limits={kl_divergence_mean: 9}", "--set", f"check.on_undecided={setting}")
    result = compress_cli("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", *QUICK_APPLY, *settings)
    assert result.exit_code == code, result.output
    assert strict((tmp_path / "out" / "report.json").read_text())["verdict"] == "undecided"
    assert "verdict: undecided" in result.stdout
    assert ("verdict: undecided" in result.stderr) == bool(code)


def test_another_word_for_the_undecided_is_refused(compress_cli, small, tmp_path):
    said = refusal_of_command(compress_cli("check", small, small, *UNDECIDABLE, "--on-undecided", "ignore"))
    assert "on-undecided" in said and "fail" in said
    (tmp_path / "recipe.yaml").write_text("version: 1\ncheck:\n  on_undecided: ignore\n")
    assert "recipe.yaml:3: check.on_undecided" in refusal(lambda: load_recipe(str(tmp_path / "recipe.yaml")))


def test_logits_that_are_no_numbers_give_figures_that_are_none():
    log_p = torch.log_softmax(torch.randn(5, 7), -1)
    logits = torch.randn(5, 7)
    logits[3, 2] = float("nan")
    values = summarize(score(log_p, logits, torch.tensor([0, 1, 2, 3, 4])))
    of_all = {metric: value for metric, value in values.items() if not metric.startswith("top1_")}
    assert len(of_all) == 8
    assert not np.isfinite(list(of_all.values())).any()


@pytest.mark.filterwarnings("error")
def test_a_perplexity_beyond_every_number_is_no_warning_but_infinite():
    losses = np.full(3, 1000.0)
    scores = Scores(np.zeros(3), losses, losses, losses, *np.zeros((3, 3), bool))
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
    values = {row["value"] for row in document["checks"] if not row["metric"].startswith("top1_")}
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
