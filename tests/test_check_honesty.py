"""What a check says beside its verdict: the windows that changed most, with their text, and figures too good to be believed."""

import json

import numpy as np
import pytest
import torch
from jamba_models import load_reference

from compress.check import remarks, worst
from compress.check.compare import Found, Row
from compress.check.metrics import Scores, WindowScores
from compress.check.scored import Scored
from compress.prompts import PromptSet
from compress.recipe.source import load_tokenizer
from compress.runtime.artifacts import open_artifact

# --- worst windows


def window(kl: np.ndarray, first: int = 1) -> WindowScores:
    losses = np.full(len(kl), 2.0)
    return WindowScores(first, Scores(losses, losses + 0.5, kl, kl, *np.ones((3, len(kl)), bool)))


def of_set(name: str, windows: dict[int, WindowScores]) -> Scored:
    return Scored(PromptSet(name, [torch.arange(50)] * 9), windows, [], 0)


def test_the_worst_windows_are_those_of_the_largest_mean_over_all_sets():
    """A single bad token does not make a window the worst; windows are named by their place in the set."""
    flat = {place: window(np.full(40, size)) for place, size in ((0, 0.1), (2, 0.4), (5, 0.3))}
    peak = np.full(30, 0.15)
    peak[17] = 1.0
    found = worst.find(
        "onnx", "decode", [of_set("a", flat), of_set("b", {3: window(peak, first=9), 4: window(np.full(8, 0.2))})]
    )
    assert [(row["prompts"], row["window"]) for row in found] == [("a", 2), ("a", 5), ("b", 4), ("b", 3), ("a", 0)]
    assert found[3]["position"] == 9 + 17
    assert found[3]["kl_divergence_mean"] == pytest.approx(peak.mean())
    assert found[3]["perplexity_ratio"] == pytest.approx(np.exp(0.5))


def test_five_windows_are_named_at_most_and_none_that_did_not_change():
    many = {place: window(np.full(4, float(place % 7))) for place in range(20)}
    assert [row["kl_divergence_mean"] for row in worst.find("it", "decode", [of_set("a", many)])] == [6, 6, 5, 5, 5]
    still = {place: window(np.zeros(4)) for place in range(3)}
    assert worst.find("it", "decode", [of_set("a", still)]) == []


def test_a_window_of_no_finite_figure_is_the_worst():
    broken = np.full(12, 0.1)
    broken[7:] = np.nan
    found = worst.find("it", "decode", [of_set("a", {0: window(np.full(12, 9.0)), 1: window(broken)})])
    assert [(row["window"], row["kl_divergence_mean"], row["position"]) for row in found] == [(1, None, 8), (0, 9.0, 1)]
    json.dumps(found, allow_nan=False)


def test_worst_windows_are_told_with_what_both_models_read_and_go_on_with(tiny, applied):
    tokenizer, original, artifact = load_tokenizer(tiny), open_artifact(tiny), open_artifact(applied / "checkpoint")
    generator = torch.Generator().manual_seed(3)
    sets = [PromptSet("a", [torch.randint(3, 2048, (200,), generator=generator) for _ in range(3)])]
    peaks = np.full((3, 199), 0.01)
    peaks[0, 140], peaks[2, 9] = 3.0, 2.0
    scored = Scored(sets[0], {place: window(peaks[place]) for place in (0, 2)}, [], 0)
    rows = worst.find("checkpoint", "decode", [scored])
    worst.tell(rows, sets, original, original.sha256(), artifact)
    assert [(row["window"], row["position"]) for row in rows] == [(0, 141), (2, 10)]
    for row, tokens in zip(rows, (sets[0].windows[0][81:141], sets[0].windows[2][:10]), strict=True):
        assert row["text"] == tokenizer.decode(tokens.tolist())
        for key, folder in (("baseline_text", tiny), ("candidate_text", applied / "checkpoint")):
            assert row[key] == _greedy(folder, tokens, tokenizer), key


def _greedy(folder, tokens, tokenizer) -> str:
    found = load_reference(folder).generate(tokens[None], max_new_tokens=24, do_sample=False)
    return tokenizer.decode(found[0, len(tokens) :].tolist())


def test_a_model_that_is_read_from_disk_for_every_token_goes_on_with_nothing(tiny, monkeypatch):
    original = open_artifact(tiny)
    monkeypatch.setattr(original, "bytes_read_per_step", lambda: 1)
    monkeypatch.setattr(worst.generated, "generate", lambda *_: pytest.fail("it would take hours"))
    sets = [PromptSet("a", [torch.arange(3, 53)])]
    rows = worst.find("it", "decode", [Scored(sets[0], {0: window(np.full(49, 0.1))}, [], 0)])
    worst.tell(rows, sets, original, original.sha256(), open_artifact(tiny))
    assert (rows[0]["text"] is None, rows[0]["baseline_text"], rows[0]["candidate_text"]) == (False, None, None)


def test_a_model_without_a_tokenizer_has_worst_windows_without_text(compress_cli, small, applied):
    result = compress_cli("check", small, small, "--prompts", "self", "--samples", 2, "--length", 9, "--json", "-")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["worst_prompts"]
    assert {(row["text"], row["baseline_text"], row["candidate_text"]) for row in rows} <= {(None, None, None)}


# --- remarks


def row(
    metric: str, value: float | None, low: float | None = None, high: float | None = None, phase: str = "prefill"
) -> Row:
    return Row("onnx", metric, phase, "all", value, 100, low=low, high=high)


def divergences(prefill: float, decode: float) -> list[Row]:
    return [row("kl_divergence_mean", prefill), row("kl_divergence_mean", decode, phase="decode")]


def said(rows: list[Row], is_baseline: bool = False, p_value: float = 0.001) -> str:
    flips = [{"phase": "prefill", "prompts": "all", "p_value": p_value}]
    return " | ".join(remarks.remarks(Found(rows, flips=flips), lambda: is_baseline))


def test_nothing_is_said_of_what_is_as_it_should_be():
    rows = [
        *divergences(0.001, 0.001),
        row("perplexity_ratio", 1.01, 1.0, 1.02),
        row("top1_accuracy_drop", 0.1, 0.05, 0.2),
    ]
    assert said(rows) == ""
    noise = [row("perplexity_ratio", 0.99, 0.97, 1.001), row("recall_accuracy_drop", -0.01, -0.02, 0.0)]
    assert said([*divergences(0.001, 0.001), *noise]) == "", "an improvement within the interval is none"
    assert said([*divergences(float("nan"), float("nan")), row("perplexity_ratio", float("nan"))]) == ""
    assert said([*divergences(0.0, 0.001)]) == "", "states that are rounded change nothing in prefill"


def test_a_candidate_that_is_the_baseline_is_noted():
    assert "onnx is the baseline itself" in said(divergences(0.0, 0.0), is_baseline=True)
    # an ONNX file that rounds activations is compared with what it gave in one pass
    assert "onnx is the baseline itself" in said(divergences(0.0, 0.0003), is_baseline=True)
    assert "nothing was compressed" in said(divergences(0.0, 1e-12))
    found = Found(divergences(0.1, 0.1))
    remarks_without_reading = remarks.remarks(found, lambda: pytest.fail("reads the whole artifact"))
    assert list(remarks_without_reading) == []


@pytest.mark.parametrize(("metric", "figures", "words"), [
    ("perplexity_ratio", (0.98, 0.97, 0.99), "perplexity improved by 2 % [1 to 3]"),
    ("top1_accuracy_drop", (-0.02, -0.03, -0.01), "top-1 accuracy rose by 2 percentage points [1 to 3]"),
    ("recall_accuracy_drop", (-0.02, -0.03, -0.01), "recall rose by 2 percentage points [1 to 3]"),
    ("task_accuracy_drop", (-0.02, -0.03, -0.01), "accuracy in tasks rose by 2 percentage points [1 to 3]"),
])  # fmt: skip
def test_an_improvement_beyond_the_interval_is_suspicious(metric, figures, words):
    found = said([*divergences(0.001, 0.001), row(metric, *figures)])
    assert f"onnx: {words} in prefill: suspicious" in found
    assert "seen in calibration" in found and "baseline" in found


def test_two_positions_that_became_right_are_chance_however_narrow_their_interval():
    gained = [*divergences(0.001, 0.001), row("top1_accuracy_drop", -0.0005, -0.0005, -0.0005)]
    assert said(gained, p_value=0.5) == ""


def test_a_check_of_a_model_against_itself_says_so_and_keeps_its_verdict(compress_cli, tiny):
    arguments = (
        "--prompts",
        "heldout",
        "--samples",
        2,
        "--length",
        24,
        "--limit",
        "kl_divergence_mean=0.1",
        "--json",
        "-",
    )
    result = compress_cli("check", tiny, tiny, *arguments)
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["verdict"] == "pass"
    assert len(document["remarks"]) == 1 and "checkpoint is the baseline itself" in document["remarks"][0]
    assert "checkpoint is the baseline itself" in " ".join(result.stderr.split())
