"""What a check measures beyond means over all positions: drift in decode, divergence by position, recall by distance, decoding
after a prompt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jamba_models import load_reference
from refusals import refusal, refusal_of_command
from scipy import stats

from compress.apply import exporting
from compress.check import baseline, judge
from compress.check.compare import Found, compare, verdict
from compress.checkpoint.reader import Checkpoint
from compress.prompts import PromptSet, passages, recall
from compress.prompts.questions import Question, bucket_of
from compress.recipe.check import Check
from compress.recipe.source import load_tokenizer
from compress.runtime.artifacts import open_artifact
from compress.runtime.candidates import CheckpointCandidate, OnnxCandidate

VOCABULARY = 11
LENGTHS = (600, 300, 258, 257, 20)


class Given:
    """A candidate of given logits [n - 1, V] for each window, after a prompt of `prefill` tokens in decode; a piece is a
    hundred positions."""

    vocab_size = VOCABULARY

    def __init__(self, logits: list[torch.Tensor], prefill: int = 0):
        self._logits, self._prefill = logits, prefill

    def steps(self, tokens: int) -> int:
        return tokens

    def logits(self, windows, phase, advance):
        for window, rows in enumerate(self._logits):
            for start in range(self._prefill if phase == "decode" else 0, len(rows), 100):
                yield window, start, rows[start : start + 100]


def stored(folder: Path, prompt_set: PromptSet, logits: list[torch.Tensor]) -> baseline.Baseline:
    with open(folder / "baseline", "wb") as file:
        for rows in logits:
            torch.log_softmax(rows, -1).numpy().tofile(file)
    return baseline.Baseline(folder / "baseline", prompt_set, VOCABULARY)


class Example:
    """Windows of random tokens, and random logits for them."""

    def __init__(self, folder: Path, lengths: tuple[int, ...]):
        generator = torch.Generator().manual_seed(4)
        self.windows = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
        shapes = [(length - 1, VOCABULARY) for length in lengths]
        self.p = [2 * torch.randn(shape, generator=generator) for shape in shapes]
        self.q = [p + 0.3 * torch.randn(p.shape, generator=generator) for p in self.p]
        prompt_set = PromptSet("random", self.windows)
        self.sets = [(prompt_set, stored(folder, prompt_set, self.p))]

    def compared(self, limits: dict | None = None, prefill: int = 0) -> Found:
        return compare("given", Given(self.q, prefill), self.sets, limits or {})

    def by_hand(self, first: int, last: int) -> dict[str, float]:
        """Over the tokens `first` to `last` of every window, one after another, in float64."""
        p_losses, q_losses, divergences = [], [], []
        for window, p, q in zip(self.windows, self.p, self.q, strict=True):
            for token in range(max(first, 1), min(last + 1, len(window))):
                log_p, log_q = (x[token - 1].double() - torch.logsumexp(x[token - 1].double(), 0) for x in (p, q))
                p_losses.append(-float(log_p[window[token]]))
                q_losses.append(-float(log_q[window[token]]))
                divergences.append(float((log_p.exp() * (log_p - log_q)).sum()))
        p_perplexity, q_perplexity = np.exp(np.mean(p_losses)), np.exp(np.mean(q_losses))
        return {
            "positions": len(divergences),
            "kl_divergence_mean": np.mean(divergences),
            "baseline_perplexity": p_perplexity,
            "candidate_perplexity": q_perplexity,
            "ratio": q_perplexity / p_perplexity,
        }


@pytest.fixture
def example(tmp_path) -> Example:
    return Example(tmp_path, LENGTHS)


def rows_of(found: Found, metric: str, prompts: str = "all") -> list:
    return [row for row in found.rows if row.metric == metric and row.prompts == prompts]


# --- drift, and figures by position


def test_drift_is_the_perplexity_ratio_of_tokens_257_and_later_in_decode_alone(example):
    expected = example.by_hand(257, 10_000)
    (row,) = rows_of(example.compared(), "decode_drift_ratio")
    assert row.phase == "decode"
    assert row.positions == expected["positions"] == (600 - 257) + (300 - 257) + 1
    assert row.value == pytest.approx(expected["ratio"], rel=1e-6)  # float32 against float64
    assert row.low < row.value < row.high


def test_drift_has_a_limit_from_above(example):
    (row,) = rows_of(example.compared(), "decode_drift_ratio")
    for limit, outcome in ((row.high, "held"), (row.value, "undecided"), (row.low - 1e-6, "missed")):
        found = example.compared({"decode_drift_ratio": limit})
        assert [row.outcome for row in rows_of(found, "decode_drift_ratio")] == [outcome]
        assert verdict(found) == {"held": "pass", "missed": "fail"}.get(outcome, outcome)


def test_more_tokens_are_those_of_windows_that_tell_the_metric(example):
    """As many windows again as it takes, short of which the limit lies in the interval."""
    (row,) = rows_of(example.compared(), "decode_drift_ratio")
    limit = (row.value + row.high) / 2
    found = rows_of(example.compared({"decode_drift_ratio": limit, "kl_divergence_mean": 1.0}), "decode_drift_ratio")
    assert found[0].more_tokens == pytest.approx((600 + 300 + 258) * (2**2 - 1), abs=1)
    whole = rows_of(example.compared(), "kl_divergence_mean")
    assert {row.tokens for row in whole} == {sum(LENGTHS)}


@pytest.mark.parametrize("prefill", [0, 280])
def test_what_decoding_changes_by_itself_is_told_from_what_both_ways_lose(tmp_path, prefill):
    """A candidate far from the baseline in both phases, and 0.02 to 0.04 nats off in what it decodes."""
    example = Example(tmp_path, LENGTHS)
    decoded = [rows + 0.0 for rows in example.q]
    changes = []
    for window, rows in zip(example.windows, decoded, strict=True):
        for token in range(prefill + 1, len(window)):
            log_q = rows[token - 1].double().log_softmax(-1)
            rows[token - 1, window[token]] += 0.04
            changes.append(float(rows[token - 1].double().log_softmax(-1)[window[token]] - log_q[window[token]]))

    class Decoding(Given):
        def logits(self, windows, phase, advance):
            self._logits = decoded if phase == "decode" else example.q
            return super().logits(windows, phase, advance)

    (row,) = rows_of(compare("given", Decoding(example.q, prefill), example.sets, {}), "decode_prefill_difference")
    assert (row.phase, row.positions) == ("decode", len(changes))
    assert row.value == pytest.approx(np.sqrt(np.mean(np.square(changes))), rel=1e-3)  # float32 log-probabilities
    assert row.low < row.value < row.high
    (still,) = rows_of(example.compared(prefill=prefill), "decode_prefill_difference")
    assert (still.value, still.low, still.high) == (0, 0, 0)


def test_windows_too_short_for_drift_have_no_row_and_a_limit_on_it_is_not_checked(tmp_path):
    example = Example(tmp_path, (257, 100))
    assert not rows_of(example.compared(), "decode_drift_ratio")
    found = example.compared({"decode_drift_ratio": 1.5})
    (row,) = rows_of(found, "decode_drift_ratio")
    facts = row.to_json()
    assert (facts["value"], facts["low"], facts["high"], facts["positions"], facts["passed"]) == (
        None,
        None,
        None,
        0,
        None,
    )
    assert "258 tokens" in facts["note"]
    assert verdict(found) == "not_checked"
    held = example.compared({"decode_drift_ratio": 1.5, "top1_agreement": 0.0})
    assert verdict(held) == "not_checked", "a limit that was held does not stand for one that nothing was compared with"
    missed = example.compared({"decode_drift_ratio": 1.5, "kl_divergence_mean": 0.0})
    assert verdict(missed) == "fail"


def test_divergence_by_position_is_that_of_the_positions(example):
    found = [row for row in example.compared().by_position if row["phase"] == "prefill"]
    edges = [(0, 63), (64, 255), (256, 511), (512, 1023)]
    assert [(row["first"], row["last"]) for row in found] == edges
    for row, (first, last) in zip(found, edges, strict=True):
        expected = example.by_hand(first, last)
        assert row["positions"] == expected["positions"]
        for name in ("kl_divergence_mean", "baseline_perplexity", "candidate_perplexity"):
            assert row[name] == pytest.approx(expected[name], rel=1e-5)  # float32 against float64
    several = [row for row in found if row["first"] < 512]
    assert all(row["low"] < row["kl_divergence_mean"] < row["high"] for row in several)
    assert (found[-1]["low"], found[-1]["high"]) == (None, None), "one window has such positions"


@pytest.mark.parametrize(("place", "bucket"), [(0, (0, 63)), (63, (0, 63)), (64, (64, 255)), (256, (256, 511)),
                                               (2047, (1024, 2047)), (2048, (2048, 4095))])  # fmt: skip
def test_buckets_double(place, bucket):
    assert bucket_of(place) == bucket


def test_after_a_prompt_the_tokens_that_were_decoded_are_scored_in_decode(example):
    found = example.compared(prefill=280)
    decoded, whole = example.by_hand(281, 10_000), example.by_hand(1, 10_000)
    for row in rows_of(found, "kl_divergence_mean"):
        expected = decoded if row.phase == "decode" else whole
        assert (row.positions, row.value) == (
            expected["positions"],
            pytest.approx(expected["kl_divergence_mean"], rel=1e-5),
        )
    assert rows_of(found, "decode_drift_ratio")[0].value == pytest.approx(decoded["ratio"], rel=1e-6)
    assert min(row["first"] for row in found.by_position if row["phase"] == "decode") == 256


@pytest.mark.parametrize("prefill", [0, 280])
def test_flips_are_counted_by_phase_and_set_with_their_direction(tmp_path, prefill):
    example = Example(tmp_path, LENGTHS)
    targets = [window[1:] for window in example.windows]
    for phase, first in (("prefill", 0), ("decode", prefill)):
        right = [[torch.cat([rows[first:].argmax(-1) == y[first:] for rows, y in zip(of, targets, strict=True)])]
                 for of in (example.p, example.q)]  # fmt: skip
        before, after = (one[0].numpy() for one in right)
        expected = [(before & after).sum(), (before & ~after).sum(), (~before & after).sum(), (~before & ~after).sum()]
        assert min(expected) > 0, "the example must not be a trivial one"
        for prompts in ("all", "random"):
            (row,) = [row for row in example.compared(prefill=prefill).flips
                      if (row["phase"], row["prompts"]) == (phase, prompts)]  # fmt: skip
            assert [row[key] for key in ("both_right", "only_baseline", "only_candidate", "neither")] == expected
            assert row["positions"] == len(before)
            assert row["p_value"] == pytest.approx(
                stats.binomtest(int(expected[1]), int(expected[1] + expected[2])).pvalue
            )


# --- recall


def asked(right_p: list[list[bool]], right_q: list[list[bool]], tmp_path: Path, limits: dict | None = None) -> Found:
    """Windows of 40 tokens with a question at token 10 (distance 5) and at 30 (distance 25), answered as said."""
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(VOCABULARY, (40,), generator=generator) for _ in right_p]
    questions = tuple(
        Question(window, token, (distance, distance))
        for window in range(len(windows))
        for token, distance in ((30, 25), (10, 5))
    )
    prompt_set = PromptSet("recall", windows, questions=questions)

    def logits(right: list[list[bool]]) -> list[torch.Tensor]:
        """As if a model knew all but some answers."""
        found = []
        for window, is_right in zip(windows, right, strict=True):
            most_likely = window[1:].clone()
            for token, correct in zip((10, 30), is_right, strict=True):
                most_likely[token - 1] += not correct
            found.append(5.0 * torch.nn.functional.one_hot(most_likely % VOCABULARY, VOCABULARY))
        return found

    sets = [(prompt_set, stored(tmp_path, prompt_set, logits(right_p)))]
    return compare("given", Given(logits(right_q)), sets, limits or {})


YES, NO = True, False


def test_recall_by_distance_counts_exact_answers_of_both(tmp_path):
    before = [[YES, YES], [YES, YES], [YES, YES], [NO, YES], [YES, YES]]
    after = [[YES, NO], [YES, NO], [NO, NO], [YES, YES], [YES, YES]]
    found = asked(before, after, tmp_path)
    for phase in ("prefill", "decode"):
        near, far = (row for row in found.recall if row["phase"] == phase)
        assert (near["first"], near["last"], near["trials"]) == (5, 5, 5)
        assert (near["baseline_accuracy"], near["candidate_accuracy"], near["drop"]) == (0.8, 0.8, 0)
        assert (far["first"], far["trials"]) == (25, 5)
        assert (far["baseline_accuracy"], far["candidate_accuracy"]) == (1.0, 0.4)
        assert far["drop"] == pytest.approx(0.6)
        assert -1 <= far["low"] < 0.6 < far["high"] <= 1
    for row in rows_of(found, "recall_accuracy_drop"):
        assert (row.value, row.positions) == (pytest.approx(0.3), 10)
        assert row.low < 0.3 < row.high


def test_answers_that_all_stayed_the_same_do_not_prove_that_none_can_change(tmp_path):
    right = [[YES, YES]] * 20
    (row, _) = rows_of(asked(right, right, tmp_path), "recall_accuracy_drop")
    # of 40 trials without a change, 8.8 % may change: 0.025 ** (1 / 40) = 0.912
    assert (row.value, row.low, row.high) == (0, pytest.approx(-0.0881, abs=1e-4), pytest.approx(0.0881, abs=1e-4))


def test_few_questions_do_not_hold_a_limit_on_recall_and_more_would(tmp_path):
    """Of 40 questions none changed; 0.044 takes twice as many, each window of 40 tokens with two."""
    right = [[YES, YES]] * 20
    for limit, outcome in ((0.09, "held"), (0.044, "undecided")):
        row, _ = rows_of(asked(right, right, tmp_path, {"recall_accuracy_drop": limit}), "recall_accuracy_drop")
        assert (row.outcome, row.passed) == (outcome, outcome == "held")
    assert row.more_tokens == pytest.approx(20 * 40, rel=0.01)


def test_a_limit_on_recall_that_nothing_was_asked_for_is_not_checked(example):
    found = example.compared({"recall_accuracy_drop": 0.1})
    assert [(row.phase, row.value, row.passed) for row in rows_of(found, "recall_accuracy_drop")] == [
        ("prefill", None, None),
        ("decode", None, None),
    ]
    assert verdict(found) == "not_checked"


@pytest.mark.parametrize("distances", [(0, 70), (33,)])
@pytest.mark.parametrize("trials", [3, 8, 20])
def test_questions_at_distances_are_as_many_and_as_far_as_asked(tiny, distances, trials):
    tokenizer = load_tokenizer(tiny)
    found = recall.at_distances(tokenizer, passages.shipped("heldout"), distances, trials, seed=1)
    for distance in distances:
        assert trials <= sum(question.distance == (distance, distance) for question in found.questions) < trials + 8
    assert {question.distance[0] for question in found.questions} == set(distances)
    is_token = tokenizer.convert_tokens_to_ids("▁is")
    for question in found.questions:
        window, distance = found.windows[question.window].tolist(), question.distance[0]
        in_window = [other for other in found.questions if other.window == question.window]
        told = [i + 1 for i, token in enumerate(window) if token == is_token and window[i - 2] != 0]
        facts = [place for place in told if place < len(window) - distance]
        assert window[question.position - 1] == is_token
        name = window[question.position - 2]
        stated = [place for place in facts if window[place - 2] == name and place != question.position]
        assert stated, "the name was told of"
        assert window[min(stated)] == window[question.position]
        assert len(window) > distance + 13 * len(in_window)
    assert sum(map(len, found.windows)) <= recall.most_tokens(distances, trials)


def test_the_plain_recall_set_asks_once_a_window_at_its_end(tiny):
    found = recall.windows(load_tokenizer(tiny), passages.shipped("heldout"), samples=4, length=200, seed=0)
    assert [(q.window, q.position) for q in found.questions] == [(i, 199) for i in range(4)]
    assert all(0 <= q.distance[0] <= q.distance[1] < 256 for q in found.questions)


def test_a_model_recalls_as_it_did(tiny):
    settings = Check.model_validate({"prompts": ["recall"], "recall": {"distances": [8, 40], "trials": 8}})
    found, used = judge.check(open_artifact(tiny), {"checkpoint": tiny}, settings, seed=0)
    assert [(row["first"], row["trials"]) for row in found.recall] == [(8, 8), (40, 8)] * 2
    # the model's card says 0.94 to 1.00; 0.8 of 8 leaves room for the luck of the draw
    assert all(row["baseline_accuracy"] >= 0.8 and row["drop"] == 0 for row in found.recall)
    assert used[0]["windows"] == 2


# --- decoding after a prompt


@pytest.fixture(scope="module")
def float_onnx(small, tmp_path_factory) -> Path:
    return exporting.export_checkpoint(small, "onnx", tmp_path_factory.mktemp("float") / "onnx") / "model.onnx"


@pytest.mark.parametrize("prefill", [1, 2, 9, 14])
def test_logits_after_a_prompt_are_those_of_the_model(small, float_onnx, prefill):
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(3, 67, (length,), generator=generator) for length in (16, 16, 11)]
    reference = load_reference(small)
    for candidate in (
        CheckpointCandidate(Checkpoint(small).model, prefill=prefill),
        OnnxCandidate(float_onnx, prefill=prefill),
    ):
        pieces = sorted(candidate.logits(windows, "decode", lambda steps: None), key=lambda piece: piece[:2])
        for number, window in enumerate(windows):
            expected = reference(window[None]).logits[0, prefill:-1]
            rows = [rows for place, _, rows in pieces if place == number]
            assert sum(map(len, rows)) == len(expected) == max(0, len(window) - 1 - prefill)
            if rows:
                assert (torch.cat(rows) - expected).abs().max() < 1e-3  # the project's requirement on a graph
            assert min((start for place, start, _ in pieces if place == number), default=prefill) == prefill


def test_a_prompt_is_read_in_one_call_and_the_rest_token_by_token(small, monkeypatch):
    model = Checkpoint(small).model
    lengths, layer = [], type(model.layer(0))
    run = layer.run

    def listening(self, ops, hidden, state):
        if self.index == 0:
            lengths.append(hidden.shape[1])
        return run(self, ops, hidden, state)

    monkeypatch.setattr(layer, "run", listening)
    list(CheckpointCandidate(model, prefill=5).logits([torch.arange(3, 12)], "decode", lambda steps: None))
    assert lengths == [5, 1, 1, 1, 1]


# --- the command


QUICK = ("--prompts", "self", "--samples", 3, "--length", 12)


def test_the_figures_are_in_json_and_the_sentence_on_the_terminal(compress_cli, small):
    result = compress_cli(
        "check", small, small, *QUICK, "--limit", "decode_drift_ratio=1.1", "--prefill", 6, "--json", "-"
    )
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["verdict"] == "not_checked"
    assert "decode_drift_ratio: no window has the 258 tokens" in " ".join(result.stderr.split())
    assert "not checked, decode_drift_ratio could not be measured" in " ".join(result.stderr.split())
    assert {(row["phase"], row["positions"]) for row in document["by_position"]} == {("prefill", 33), ("decode", 15)}
    assert document["recall"] == []
    assert all({"low", "high"} <= row.keys() for row in document["checks"])


def test_a_single_window_has_no_interval_and_it_is_said(compress_cli, small):
    result = compress_cli("check", small, small, "--prompts", "self", "--samples", 1, "--length", 12, "--json", "-")
    assert {(row["low"], row["high"]) for row in json.loads(result.stdout)["checks"]} == {(None, None)}
    assert "a single window, which tells no interval" in " ".join(result.stderr.split())


def test_apply_reports_positions_and_distances(compress_cli, tiny, tmp_path):
    settings = ("check.prompts=[recall]", "check.recall={distances: [4], trials: 9}", "check.length=24", "check.prefill=20",
                "check.limits={recall_accuracy_drop: 1}", "passes=[]", "export=[]")  # fmt: skip
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    planned = compress_cli("apply", "tiny-int8", "-m", tiny, "-o", tmp_path / "out", *arguments, "--dry-run")
    assert "decodes after a prompt of 20 tokens" in planned.output
    assert "recall: at least 9 questions at each distance of 4 tokens" in planned.output
    result = compress_cli("apply", "tiny-int8", "-m", tiny, "-o", tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["phase"], row["first"]) for row in report["recall"]] == [("prefill", 4), ("decode", 4)]
    assert all(row["trials"] >= 9 for row in report["recall"])
    assert {row["phase"] for row in report["by_position"]} == {"prefill", "decode"}
    text = (tmp_path / "out" / "report.md").read_text()
    for words in (
        "| 95 % interval |",
        "<summary>Divergence by position</summary>",
        "<summary>Recall by distance</summary>",
    ):
        assert words in text


BAD = {
    "a prompt that is all": (("--prefill", 11), "prefill"),
    "a prompt below nothing": (("--prefill", -1), "prefill"),
    "distances without recall": (("--distance", 5), "'recall', which is not in 'prompts'"),
    "trials without distances": (("--prompts", "recall", "--trials", 5), "distances"),
    "a distance below nothing": (("--prompts", "recall", "--distance", -5), "distances"),
    "a distance twice": (("--prompts", "recall", "--distance", 5, "--distance", 5), "a distance is listed twice"),
    "no trials": (("--prompts", "recall", "--distance", 5, "--trials", 0), "trials"),
    "drift of nothing": (("--limit", "decode_drift_ratio=0"), "decode_drift_ratio"),
}


@pytest.mark.parametrize(("arguments", "said"), BAD.values(), ids=list(BAD))
def test_settings_that_make_no_sense_are_refused(compress_cli, small, arguments, said):
    assert said in refusal_of_command(compress_cli("check", small, small, *QUICK, *arguments))


def test_a_prompt_longer_than_the_text_is_refused(small):
    settings = Check(prompts=("self",), samples=2, length=300, prefill=250)
    sets = [PromptSet("mine.txt", [torch.arange(3, 60)])]
    assert "mine.txt" in refusal(lambda: judge._refuse_nothing_to_decode(sets, settings.prefill))
