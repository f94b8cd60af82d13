"""Checks beside others: what is better or worse than an earlier result, or than an artifact that is the baseline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal, refusal_of_command
from scipy import stats

from compress.check import changes, earlier
from compress.check.standing import OnTask, OnText, Standing
from compress.recipe.check import Check

QUICK = ("--prompts", "self", "--samples", "6", "--length", "48")


# --- what is better or worse


def on_text(nll: np.ndarray, right: np.ndarray, kl: np.ndarray | None = None, length: int = 100) -> OnText:
    """A set whose windows have these means over `length` positions."""
    beside = {} if kl is None else {"kl_divergence": tuple(length * kl), "same_top1": tuple(map(int, right))}
    return OnText(artifact=None, prompts="a", sha256="", phase="decode", positions=(length,) * len(nll),
                  nll=tuple(length * nll), right=tuple(map(int, right)), **beside)  # fmt: skip


def outcomes(old: OnText, new: OnText, bytes_of=(10, 10)) -> dict[str, changes.ChangeFacts]:
    before, after = (
        Standing(text=(one,), tasks=(), weight_bytes=size) for one, size in zip((old, new), bytes_of, strict=True)
    )
    return {row["metric"]: row for row in changes.between(before, after)}


RNG = np.random.default_rng(3)
NLL, RIGHT = RNG.gamma(9, 0.3, 40), RNG.integers(30, 60, 40)  # windows differ far more than what is to be seen


@pytest.mark.parametrize(
    ("shift", "expected"), [(0.01, "worse"), (-0.01, "better"), (0.0, "undecided"), (5e-6, "undecided")]
)
def test_a_difference_is_told_from_what_windows_have_in_common(shift, expected):
    found = outcomes(on_text(NLL, RIGHT), on_text(NLL + shift + RNG.normal(0, 0.01, 40) * (1, -1)[shift < 0], RIGHT))
    row = found["perplexity"]
    assert row["outcome"] == expected
    assert (row["old"], row["new"]) == pytest.approx((np.exp(NLL.mean()), row["old"] + row["difference"]))
    assert row["low"] <= row["difference"] <= row["high"]
    alone = 4 * np.exp(NLL.mean()) * NLL.std() / np.sqrt(40)  # about the interval of either perplexity by itself
    assert 0 < row["high"] - row["low"] < alone / 20


def test_the_same_and_what_rounding_in_another_order_gives_is_the_same():
    same = outcomes(on_text(NLL, RIGHT, NLL / 1e4), on_text(NLL, RIGHT, NLL / 1e4))
    assert {row["outcome"] for row in same.values()} == {"same"}
    assert (same["perplexity"]["low"], same["perplexity"]["high"]) == (0, 0)
    assert same["top1_accuracy"]["low"] < 0 < same["top1_accuracy"]["high"], "as many may differ as were not seen"
    noise = 1e-6 * (1 + RNG.random(40))
    found = outcomes(on_text(NLL, RIGHT, NLL / 1e4), on_text(NLL + noise, RIGHT, NLL / 1e4 + noise / 10))
    assert (found["perplexity"]["outcome"], found["kl_divergence_mean"]["outcome"]) == ("same", "same")


@pytest.mark.parametrize(("gain", "expected"), [(2, "better"), (-2, "worse")])
def test_of_shares_more_is_better_and_of_bytes_fewer(gain, expected):
    found = outcomes(on_text(NLL, RIGHT, NLL), on_text(NLL, RIGHT + gain, NLL), (10, 10 - gain))
    assert {found[name]["outcome"] for name in ("top1_accuracy", "top1_agreement", "weight_bytes")} == {expected}
    assert found["top1_accuracy"]["difference"] == pytest.approx(gain / 100)
    assert [row["metric"] for row in changes.worse(list(found.values()))] == (
        [] if gain > 0 else ["top1_accuracy", "top1_agreement"]), "size is no accuracy"  # fmt: skip


def test_figures_that_are_no_numbers_are_worse_than_any():
    broken = on_text(NLL, RIGHT).model_copy(update={"nll": (None,) * 40})
    assert outcomes(on_text(NLL, RIGHT), broken)["perplexity"]["outcome"] == "worse"
    assert outcomes(broken, on_text(NLL, RIGHT))["perplexity"]["outcome"] == "better"
    row = outcomes(broken, broken)["perplexity"]
    assert (row["outcome"], row["old"], row["difference"], row["low"]) == ("undecided", None, None, None)


def test_one_window_decides_nothing():
    found = outcomes(on_text(NLL[:1], RIGHT[:1]), on_text(NLL[:1] + 1, RIGHT[:1]))
    assert (found["perplexity"]["outcome"], found["perplexity"]["low"]) == ("undecided", None)


def test_the_intervals_of_all_metrics_of_a_table_hold_together():
    """Each of four is one of 98.75 %, so that one that is worse by chance is rare in a table, too."""
    noise = RNG.normal(0, 0.01, 40)
    alone = outcomes(on_text(NLL, RIGHT), on_text(NLL + noise, RIGHT))["perplexity"]
    among = outcomes(on_text(NLL, RIGHT, NLL), on_text(NLL + noise, RIGHT, NLL))["perplexity"]
    wider = stats.t.isf(0.025 / 4, 39) / stats.t.isf(0.025 / 2, 39)
    assert (among["high"] - among["low"]) / (alone["high"] - alone["low"]) == pytest.approx(wider, rel=0.12)


def test_tasks_are_paired_item_by_item():
    before, after = (
        Standing(text=(), tasks=(OnTask(artifact=None, task="t", sha256="", right=right),), weight_bytes=1)
        for right in ((True,) * 60 + (False,) * 40, (True,) * 45 + (False,) * 55)
    )
    row = changes.between(before, after)[0]
    assert (row["metric"], row["outcome"], row["difference"]) == ("task_accuracy", "worse", pytest.approx(-0.15))


# --- the command


def compressed(compress_cli, model: Path, out: Path, *arguments) -> Path:
    result = compress_cli("apply", "tiny-int8", "-m", model, "-o", out, "--set", "check=null", *arguments)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def fine(compress_cli, small, tmp_path_factory) -> Path:
    """The small model in int8."""
    return compressed(compress_cli, small, tmp_path_factory.mktemp("fine") / "out")


@pytest.fixture(scope="module")
def coarse(compress_cli, small, tmp_path_factory) -> Path:
    """And in int4."""
    weights = ("--set", "passes.0.quantize.weights=int4-g32")
    return compressed(compress_cli, small, tmp_path_factory.mktemp("coarse") / "out", *weights)


@pytest.fixture(scope="module")
def kept(compress_cli, small, fine, tmp_path_factory) -> Path:
    """The result of checking the int8 ONNX file."""
    path = tmp_path_factory.mktemp("kept") / "int8.json"
    result = compress_cli("check", small, fine, *QUICK, "--save-result", path)
    assert result.exit_code == 0, result.output
    return path


def changed(rows) -> dict[tuple[str, str], str]:
    return {(row["metric"], row["phase"]): row["outcome"] for row in rows}


def test_the_same_artifact_is_the_same_as_its_result(compress_cli, small, fine, kept, tmp_path):
    result = compress_cli(
        "check", small, fine, *QUICK, "--against-result", kept, "--fail-if-worse", "--json", tmp_path / "r"
    )
    assert (result.exit_code, "verdict: pass" in result.stderr) == (0, True), result.output
    against = json.loads((tmp_path / "r").read_text())["against_result"]
    assert set(changed(against["changes"]).values()) == {"same"}
    assert (against["file"], against["candidate"]) == (str(kept), str(fine))


@pytest.mark.parametrize("fails", [True, False])
def test_a_worse_artifact_is_worse_than_the_result_and_fails_where_asked(
    compress_cli, small, coarse, kept, tmp_path, fails
):
    arguments = ("--against-result", kept, *(["--fail-if-worse"] if fails else []), "--json", tmp_path / "r")
    result = compress_cli("check", small, coarse, *QUICK, *arguments)
    found = json.loads((tmp_path / "r").read_text())
    told = changed(found["against_result"]["changes"])
    assert {told["kl_divergence_mean", "prefill"], told["top1_agreement", "decode"]} == {"worse"}
    assert told["weight_bytes", None] == "better"
    assert (result.exit_code, found["verdict"]) == ((1, "fail") if fails else (0, "not_checked"))
    assert ("verdict: fail; worse than before: perplexity (prefill) and " in result.stderr) == fails


def test_then_and_now_are_what_the_rows_say(compress_cli, small, coarse, kept, tmp_path):
    """The pairs against the figures of the check itself, which come from every position."""
    compress_cli("check", small, coarse, *QUICK, "--against-result", kept, "--json", tmp_path / "r")
    found = json.loads((tmp_path / "r").read_text())
    rows = {(row["metric"], row["phase"]): row["value"] for row in found["checks"] if row["prompts"] == "all"}
    for row in found["against_result"]["changes"]:
        if (value := rows.get((row["metric"], row["phase"]))) is not None:
            assert row["new"] == pytest.approx(value, rel=1e-6), row["metric"]
    perplexities = {row["phase"]: row for row in found["against_result"]["changes"] if row["metric"] == "perplexity"}
    positions = [row for row in found["by_position"] if row["phase"] == "decode"]
    assert [row["candidate_perplexity"] for row in positions] == [
        pytest.approx(perplexities["decode"]["new"], rel=1e-6)
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"length": 40}, "length 48, this check has 40"),
        ({"samples": 5}, "samples 6"),
        ({"prefill": 8}, "prefill 0"),
        ({"prompts": ("recall",)}, "prompts self, this check on recall"),
        ({"tasks": ("t.jsonl",)}, "tasks none, this check on t.jsonl"),
        ({}, "seed 0, this check has 1"),
    ],
    ids=str,
)
def test_a_result_on_other_ground_is_refused_by_what_differs(kept, changes, said):
    then = earlier.read(kept)
    settings = Check(**({"prompts": ("self",), "samples": 6, "length": 48} | changes))
    now = earlier.expected(then.ground.baseline_sha256, settings, seed=0 if changes else 1)
    assert said in refusal(lambda: earlier.refuse_other_settings(kept, then, now))


def test_a_result_of_another_baseline_is_refused(compress_cli, fine, kept):
    refused = compress_cli("check", fine / "checkpoint", fine, *QUICK, "--against-result", kept)
    assert "another baseline" in refusal_of_command(refused)


def test_a_result_on_other_text_of_the_same_name_is_refused(compress_cli, tiny, tmp_path):
    text = tmp_path / "mine.txt"
    arguments = ("check", tiny, tiny, "--prompts", text, "--samples", "1", "--length", "16")
    text.write_text("Once there was a cat who liked to sing. " * 4)
    assert compress_cli(*arguments, "--save-result", tmp_path / "r.json").exit_code == 0
    text.write_text("Once there was a dog who liked to sing. " * 4)
    assert "other text" in refusal_of_command(compress_cli(*arguments, "--against-result", tmp_path / "r.json"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: "{}", "--save-result"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), "schema"),
        (lambda text: text.replace('"weight_bytes"', '"weights"'), "weight"),
        (lambda text: text.replace('"right": [', '"right": [0,', 1), "as many sums"),
        (lambda text: text.replace("48,", '"many",', 1), "length"),
    ],
)  # fmt: skip
def test_a_damaged_result_is_refused_in_a_sentence(kept, tmp_path, damage, said):
    path = tmp_path / "damaged.json"
    path.write_text(damage(kept.read_text()))
    message = refusal(lambda: earlier.read(path))
    assert str(path) in message
    assert said in message


@pytest.mark.parametrize("option", ["--save-result", "--against-result"])
def test_a_file_that_cannot_be_written_or_read_is_refused_before_the_work(
    compress_cli, small, tmp_path, option, monkeypatch
):
    monkeypatch.setattr("compress.check.judge.check", lambda *_, **__: pytest.fail("it began"))
    assert "nowhere" in refusal_of_command(
        compress_cli("check", small, small, *QUICK, option, tmp_path / "nowhere" / "r.json")
    )


def test_a_result_may_take_the_place_of_the_one_it_is_compared_with(compress_cli, small, fine, kept, tmp_path):
    path = Path(shutil.copyfile(kept, tmp_path / "rolling.json"))
    result = compress_cli("check", small, fine, *QUICK, "--against-result", path, "--save-result", path)
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text()) == json.loads(kept.read_text())
    assert [entry.name for entry in tmp_path.iterdir()] == ["rolling.json"]


def test_two_artifacts_are_compared_on_the_text_itself(compress_cli, applied, tiny, tmp_path):
    """Neither is the truth: int4 may not fail for not being int8, and both decode themselves."""
    coarse = compressed(compress_cli, tiny, tmp_path / "out", "--set", "passes.0.quantize.weights=int4-g32")
    asked = ("--prompts", "heldout", "--prompts", "recall", "--samples", "2", "--length", "48")
    result = compress_cli("check", applied, coarse, *asked, "--json", tmp_path / "r")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r").read_text())
    assert any("not audited" in remark for remark in found["remarks"]), "what was done to one was not done to the other"
    told = {(row["metric"], row["phase"]): row for row in found["change"]}
    assert set(told) == {(name, phase) for name in ("perplexity", "top1_accuracy", "recall_accuracy")
                         for phase in ("prefill", "decode")} | {("weight_bytes", None)}  # fmt: skip
    for phase in ("prefill", "decode"):
        assert told["perplexity", phase]["old"] == pytest.approx(told["perplexity", "prefill"]["old"], rel=0.01)
        (row,) = (row for row in found["by_position"] if row["phase"] == phase)
        assert told["perplexity", phase]["new"] == pytest.approx(row["candidate_perplexity"], rel=1e-6)
    data = [folder / "onnx" / "model.onnx.data" for folder in (applied, coarse)]
    assert told["weight_bytes", None]["outcome"] == "better"
    assert [told["weight_bytes", None][key] for key in ("old", "new")] == [
        pytest.approx(path.stat().st_size, rel=0.001) for path in data]  # fmt: skip


def test_an_artifact_that_rounds_states_is_the_same_as_itself_token_by_token(compress_cli, small, tmp_path):
    """Its own decoding is the measure, not its prefill, from which it differs."""
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"version: 1\nmodel: {small}\npasses: [state_precision: {{ssm_state: {{format: int8}}}}]\n")
    assert compress_cli("apply", recipe, "-o", tmp_path / "out").exit_code == 0
    arguments = ("check", tmp_path / "out", tmp_path / "out", "--prompts", "self", "--samples", "2", "--length", "24")
    result = compress_cli(*arguments, "--fail-if-worse", "--json", tmp_path / "j")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "j").read_text())
    assert set(changed(found["change"]).values()) == {"same"}
    decoded = next(row for row in found["checks"] if (row["metric"], row["phase"]) == ("kl_divergence_mean", "decode"))
    assert decoded["value"] > 1e-7, "the example must not be a trivial one"


def test_an_original_has_no_table_of_changes(compress_cli, small, fine, tmp_path):
    result = compress_cli("check", small, fine, *QUICK, "--json", tmp_path / "r")
    assert "change" not in json.loads((tmp_path / "r").read_text())
    refused = compress_cli("check", small, fine, *QUICK, "--fail-if-worse")
    assert (result.exit_code, "--against-result" in refusal_of_command(refused)) == (0, True)
