"""Tasks: what a line asks, where an answer begins among the tokens, which items are right, and what a check says of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refusal, refusal_of_command
from scipy import stats
from text_models import changed_copy

from compress.check import tasks
from compress.checkpoint.reader import Checkpoint
from compress.prompts import task_files
from compress.recipe.source import load_tokenizer
from compress.runtime.artifacts import open_artifact

CHOICE = {"question": "The cat sat on the", "choices": ["mat", "stone floor"], "answer": 1}
CLOZE = {"context": "Once upon a", "answer": "time"}
QUICK = ("--prompts", "self", "--samples", "2", "--length", "12")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture
def write(tmp_path):
    """Lines, as JSON or as they are, to a file of tasks."""

    def write(*lines, name: str = "tasks.jsonl") -> Path:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return write


def load(tokenizer, path: Path) -> task_files.Task:
    return task_files.load(str(path), tokenizer)


# --- what a line is


def continuations(tokenizer, option: task_files.Option) -> str:
    return tokenizer.decode(option.ids[option.first :].tolist())


def test_items_are_their_texts_and_their_answers(tokenizer, write):
    named = CHOICE | {"answer": "mat", "subject": "cats"}
    choice, by_text, cloze = load(tokenizer, write(CHOICE, "", named, CLOZE)).items
    texts = [tokenizer.decode(option.ids.tolist(), skip_special_tokens=True) for option in choice.options]
    assert texts == ["The cat sat on the mat", "The cat sat on the stone floor"]
    assert [continuations(tokenizer, option).strip() for option in choice.options] == CHOICE["choices"]
    assert (choice.answer, by_text.answer) == (1, 0)
    assert (cloze.kind, continuations(tokenizer, cloze.options[0]).strip()) == ("cloze", "time")
    assert all(option.ids[0] == tokenizer.bos_token_id for option in (*choice.options, *cloze.options))


@pytest.mark.parametrize(("question", "choices"), [("The cat sat on the ", ["mat", "stone floor"]),
                                                   ("The cat sat on the", [" mat", " stone floor"])])  # fmt: skip
def test_white_space_between_question_and_choice_belongs_to_the_choice(tokenizer, write, question, choices):
    given = load(tokenizer, write(CHOICE, CHOICE | {"question": question, "choices": choices}))
    plain, spaced = given.items
    assert [option.ids.tolist() for option in spaced.options] == [option.ids.tolist() for option in plain.options]
    assert [option.first for option in spaced.options] == [option.first for option in plain.options]


class Letters:
    """A tokenizer that knows letters, and as one token `a b`."""

    bos_token_id, bos_token = None, None

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        return {"input_ids": [1 if piece == "~" else ord(piece) for piece in text.replace("a b", "~")]}


def test_a_token_that_spans_the_seam_is_of_the_continuation_and_so_are_its_letters_with_other_choices(write):
    """Else one choice would be scored after `xa`, and the other after `x`."""
    (item,) = load(Letters(), write({"question": "xa", "choices": ["b", "c"], "answer": 0})).items
    assert [option.ids.tolist() for option in item.options] == [[ord("x"), 1], [ord(letter) for letter in "xa c"]]
    assert [option.first for option in item.options] == [1, 1]
    alone = {"context": "xa", "answer": "c"}
    assert load(Letters(), write(alone)).items[0].options[0].first == 2
    assert "longer context" in refusal(lambda: load(Letters(), write({"context": "a", "answer": "b"})))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not a JSON object"),
        ("[]", "expected {"),
        ({"question": "Why?", "answer": "so"}, "expected {"),
        ({"text": "A passage."}, "expected {"),
        (CHOICE | {"choices": ["mat"]}, "'choices'"),
        (CHOICE | {"choices": "mat"}, "'choices'"),
        (CHOICE | {"choices": ["mat", 2]}, "'choices[1]'"),
        (CHOICE | {"choices": ["mat", " "]}, "'choices[1]'"),
        (CHOICE | {"choices": ["mat", "floor", "mat"]}, "choices 0 and 2"),
        (CHOICE | {"choices": ["mat", " mat"]}, "choices 0 and 1"),
        (CHOICE | {"answer": 2}, "0 to 1"),
        (CHOICE | {"answer": -1}, "0 to 1"),
        (CHOICE | {"answer": True}, "0 to 1"),
        (CHOICE | {"answer": 1.0}, "0 to 1"),
        (CHOICE | {"answer": "B"}, "'B'"),
        ({"question": "Why?", "choices": ["so", "because"]}, "'answer' is missing"),
        ({"choices": ["so", "because"], "answer": 0}, "'question' is missing"),
        (CHOICE | {"question": " "}, "'question'"),
        (CHOICE | {"question": "half \ud800"}, "U+D800"),
        ({"context": "Once"}, "'answer' is missing"),
        ({"context": "Once", "answer": ""}, "'answer'"),
        ({"context": "Once", "answer": ["upon"]}, "'answer'"),
        ({"context": 7, "answer": "upon"}, "'context'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_line_that_is_no_item_is_refused_by_its_number(tokenizer, write, line, said):
    path = write(CHOICE, line)
    message = refusal(lambda: load(tokenizer, path))
    assert message.startswith(f"{path}:2: ")
    assert said in message


def test_a_file_that_is_none_is_refused(tokenizer, write, tmp_path):
    assert "no items" in refusal(lambda: load(tokenizer, write("", " ")))
    assert "no such file" in refusal(lambda: load(tokenizer, tmp_path / "nowhere.jsonl"))
    assert ".jsonl" in refusal(lambda: load(tokenizer, write(CHOICE, name="tasks.json")))


# --- what is right


class Bigrams:
    """A candidate whose logits after a token are that token's row of a table, in pieces of three."""

    def __init__(self, table: np.ndarray):
        self.table, self.vocab_size = table, len(table)

    def steps(self, tokens: int) -> int:
        return tokens

    def logits(self, windows, phase, advance):
        assert phase == "prefill"
        for number, window in enumerate(windows):
            for start in range(0, len(window) - 1, 3):
                rows = self.table[window[start : min(start + 3, len(window) - 1)].numpy()]
                yield number, start, torch.from_numpy(rows)


def by_hand(table: np.ndarray, item: task_files.Item) -> bool:
    """Token by token, in float64."""
    sums = []
    for option in item.options:
        ids = option.ids.tolist()
        rows = [table[before].astype(float) for before in ids[option.first - 1 : -1]]
        if item.kind == "cloze":
            return all(row.argmax() == after for row, after in zip(rows, ids[option.first :], strict=True))
        sums.append(
            sum(row[after] - np.log(np.exp(row).sum()) for row, after in zip(rows, ids[option.first :], strict=True))
        )
    return int(np.argmax(sums)) == item.answer


def random_task(seed: int, items: int = 40, vocab: int = 5) -> task_files.Task:
    rng = np.random.default_rng(seed)

    def item() -> task_files.Item:
        kind = ("multiple_choice", "cloze")[rng.integers(2)]
        before, count = rng.integers(0, vocab, rng.integers(1, 9)), 1 if kind == "cloze" else rng.integers(2, 5)
        ends = [rng.integers(0, vocab, rng.integers(1, 4)) for _ in range(count)]
        options = tuple(task_files.Option(torch.tensor([*before, *end]), len(before)) for end in ends)
        return task_files.Item(kind, options, int(rng.integers(count)))

    return task_files.Task("random", tuple(item() for _ in range(items)))


def test_an_item_is_right_where_the_sum_of_its_log_probabilities_or_its_most_likely_tokens_say_so():
    table, task = np.random.default_rng(1).normal(0, 2, (5, 5)).astype(np.float32), random_task(0)
    expected = [by_hand(table, item) for item in task.items]
    found = tasks.right("any", Bigrams(table), task)
    assert found.tolist() == expected
    for kind in ("multiple_choice", "cloze"):
        of_kind = {right for right, item in zip(expected, task.items, strict=True) if item.kind == kind}
        assert of_kind == {True, False}, "the example must not be a trivial one"


def test_figures_that_are_no_numbers_answer_nothing():
    assert not tasks.right("any", Bigrams(np.full((5, 5), np.nan, np.float32)), random_task(0)).any()


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_an_artifact_and_the_model_it_was_made_from_give_options_the_same_probabilities(
    tiny, applied, tokenizer, write, kind
):
    """int8 moves them by hundredths of a nat; a wrong place among the tokens by whole ones."""
    task = load(tokenizer, write(CHOICE, CLOZE, {"question": "He ran to the", "choices": ["dog", "sky"], "answer": 0}))
    path = applied / kind / ("model.onnx" if kind == "onnx" else "")
    (before, _), (after, _) = (tasks._options("any", open_artifact(one).candidate(), task) for one in (tiny, path))
    assert np.abs(before - after).max() < 0.2
    assert (before < -0.5).all()


# --- what a check says


def answered(before: list[int], after: list[int]) -> tasks.Answered:
    """Cloze items of which both answered these."""
    item = task_files.Item("cloze", (task_files.Option(torch.tensor([1, 2]), 1),), 0)
    return tasks.Answered(task_files.Task("t", (item,) * len(before)), np.array(before, bool), np.array(after, bool))


def test_the_facts_are_the_flips_and_their_exact_test():
    before, after = [1] * 30 + [0] * 10, [1] * 21 + [0] * 9 + [1] * 2 + [0] * 8
    (row,) = tasks.facts("onnx", answered(before, after))
    assert (row["baseline_accuracy"], row["candidate_accuracy"]) == (0.75, 23 / 40)
    assert (row["only_baseline"], row["only_candidate"]) == (9, 2)
    assert row["p_value"] == pytest.approx(2 * stats.binom.cdf(2, 11, 0.5))
    assert row["change"] == pytest.approx(-7 / 40)
    change = np.array(after) - np.array(before)
    error = change.std() / np.sqrt(40)  # about what any interval of a mean is made of
    assert row["low"] == pytest.approx(-7 / 40 - 2 * error, abs=0.6 * error)
    assert row["high"] == pytest.approx(-7 / 40 + 2 * error, abs=0.6 * error)


def test_the_drop_is_over_the_items_of_all_tasks():
    figure = tasks.drop([answered([1, 1, 1, 0], [1, 0, 1, 0]), answered([1] * 12, [1] * 11 + [0])])
    assert (figure.value, figure.positions) == (2 / 16, 16)
    assert figure.interval[0] < 2 / 16 < figure.interval[1]


def test_a_check_has_tasks_by_kind_and_a_row_that_a_limit_binds(compress_cli, tiny, applied, write, tmp_path):
    path = write(CHOICE, CHOICE | {"answer": 0}, CLOZE)
    result = compress_cli("check", tiny, applied, *QUICK, "--tasks", path, "--limit", "task_accuracy_drop=1", "--json",
                          tmp_path / "result.json")  # fmt: skip
    assert result.exit_code in (0, 1), result.output
    found = json.loads((tmp_path / "result.json").read_text())
    assert [(row["kind"], row["items"]) for row in found["tasks"]] == [("multiple_choice", 2), ("cloze", 1)]
    rows = [row for row in found["checks"] if row["metric"] == "task_accuracy_drop"]
    assert [(row["phase"], row["prompts"], row["positions"], row["limit"]) for row in rows] == [
        ("prefill", "all", 3, 1)
    ]
    assert found["tasks"][0]["baseline_accuracy"] == 0.5, "one of two opposite answers is right"


def test_a_limit_on_tasks_without_one_is_not_measured(compress_cli, tiny):
    result = compress_cli("check", tiny, tiny, *QUICK, "--limit", "task_accuracy_drop=0.1")
    assert (result.exit_code, "not measured" in result.stderr) == (0, True), result.output
    assert result.stderr.count("task_accuracy_drop") == 3  # one row, a note and the verdict
    assert "--tasks FILE" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize("given", ["nowhere.jsonl", "heldout", "twice"])
def test_a_task_that_is_none_is_refused_before_the_work(compress_cli, tiny, write, given):
    path = write(CHOICE)
    given = [path, path] if given == "twice" else [given]
    said = refusal_of_command(
        compress_cli("check", tiny, tiny, *QUICK, *(arg for one in given for arg in ("--tasks", one)))
    )
    assert "task" in said


def test_a_recipe_s_task_stands_beside_it(compress_cli, tiny, write, tmp_path):
    write(CHOICE, CLOZE)
    (tmp_path / "r.yaml").write_text(
        f"version: 1\nmodel: {tiny}\npasses: [quantize: {{weights: int8}}]\n"
        "check: {prompts: [self], samples: 2, length: 12, tasks: [tasks.jsonl]}\n"
    )
    result = compress_cli("apply", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["artifact"], row["task"], row["items"]) for row in report["tasks"]] == [
        ("checkpoint", "tasks.jsonl", 1), ("checkpoint", "tasks.jsonl", 1)]  # fmt: skip
    write(CHOICE | {"answer": 9})
    refused = refusal_of_command(compress_cli("apply", tmp_path / "r.yaml", "-o", tmp_path / "other"))
    assert "tasks.jsonl:1: 'answer' is 9" in refused
    assert not list(tmp_path.glob("other*"))


def test_texts_longer_than_the_model_was_made_for_are_warned_of(compress_cli, tiny, write, tmp_path):
    short = changed_copy(tiny, tmp_path / "short", weights=True, config={"max_position_embeddings": 8})
    assert Checkpoint(short).model.config.max_position_embeddings == 8
    result = compress_cli("check", short, short, "--prompts", "self", "--samples", "2", "--length", "6", "--tasks",
                          write(CHOICE | {"question": "word " * 9}), "--json", tmp_path / "r.json")  # fmt: skip
    assert "max_position_embeddings" in result.stderr
    assert any(
        "max_position_embeddings" in remark for remark in json.loads((tmp_path / "r.json").read_text())["remarks"]
    )
