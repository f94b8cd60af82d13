"""Prompts: the shipped passages, joining them to windows, recall tasks, text from the model itself, and users' files."""

import copy
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress import prompts
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError
from compress.prompts import passages, recall, self_text
from compress.prompts.windows import join_and_cut
from compress.recipe.source import load_tokenizer
from compress.runtime.artifacts import open_artifact
from compress.runtime.inference import Decoder

BOS = 1


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture(scope="module")
def random_model(small):
    return open_artifact(small)


@pytest.fixture(scope="module")
def trained_model(tiny):
    return Checkpoint(tiny).model


class Letters:
    """A tokenizer of one token a letter."""

    chat_template = None

    def __init__(self, bos: int | None = BOS):
        self.bos_token_id = bos

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def load(name: str, tokenizer, model=None, **changes) -> prompts.PromptSet:
    settings = {"purpose": "check", "samples": 4, "length": 16, "seed": 0, "model_sha256": "unused", **changes}
    return prompts.load(str(name), tokenizer=tokenizer, model=model, **settings)


def as_lists(windows: list[torch.Tensor]) -> list[list[int]]:
    return [window.tolist() for window in windows]


# --- shipped passages


def test_there_are_enough_shipped_passages():
    assert sum(len(passages.shipped(name)) for name in prompts.SHIPPED) >= 120


@pytest.mark.parametrize("name", prompts.SHIPPED)
def test_every_shipped_passage_is_a_paragraph_or_two_of_plain_text(name):
    for text in passages.shipped(name):
        assert 80 <= len(text.split()) <= 200, text[:60]
        assert text == text.strip()
        assert "\ufffd" not in text


def test_calibration_and_check_share_no_eight_words_in_a_row():
    def runs_of_words(name: str) -> set[tuple[str, ...]]:
        texts = [re.findall(r"[a-z']+", text.lower()) for text in passages.shipped(name)]
        return {tuple(words[i : i + 8]) for words in texts for i in range(len(words) - 7)}

    assert not runs_of_words("prose") & runs_of_words("heldout")


@pytest.mark.parametrize("name", prompts.SHIPPED)
def test_no_passage_is_shipped_twice(name):
    texts = passages.shipped(name)
    assert len(set(texts)) == len(texts)


# --- windows


TEXTS = ["abcde", "fgh", "ijklmn", "op"]  # 16 letters, and one BOS each: 20 tokens


def joined(samples: int, length: int, seed: int = 0, bos: int | None = BOS) -> list[list[int]]:
    return as_lists(join_and_cut(Letters(bos), TEXTS, samples, length, seed))


def passages_in(windows: list[list[int]]) -> list[str]:
    stream = "".join("|" if token == BOS else chr(token) for window in windows for token in window)
    assert stream.startswith("|")
    return stream[1:].split("|")


def test_passages_are_joined_whole_with_a_bos_before_each():
    assert sorted(passages_in(joined(samples=100, length=7))) == sorted(TEXTS)


def test_windows_have_the_asked_length_and_the_rest_is_kept_as_a_shorter_one():
    assert [len(window) for window in joined(samples=100, length=7)] == [7, 7, 6]


def test_samples_is_the_most_windows_there_are():
    assert [len(window) for window in joined(samples=2, length=7)] == [7, 7]
    assert joined(samples=2, length=7) == joined(samples=100, length=7)[:2]


def test_a_rest_of_one_token_is_dropped_because_nothing_can_be_scored_in_it():
    assert [len(window) for window in joined(samples=100, length=19)] == [19]


def test_the_seed_decides_the_order_of_the_passages():
    orders = {tuple(passages_in(joined(samples=100, length=7, seed=seed))) for seed in range(8)}
    assert len(orders) > 1
    assert joined(samples=100, length=7, seed=3) == joined(samples=100, length=7, seed=3)


def test_a_tokenizer_without_bos_joins_without_it():
    windows = joined(samples=100, length=7, bos=None)
    assert sorted("".join(chr(token) for window in windows for token in window)) == sorted("".join(TEXTS))


def test_a_shipped_set_becomes_windows_of_its_passages(tokenizer):
    loaded = load("heldout", tokenizer, samples=3, length=64)
    assert (loaded.name, [len(window) for window in loaded.windows], loaded.tokens) == ("heldout", [64] * 3, 192)
    assert loaded.windows[0][0] == tokenizer.bos_token_id
    start = tokenizer.decode(loaded.windows[0][1:40].tolist()).strip()
    assert sum(start in text for text in passages.shipped("heldout")) == 1


def test_a_short_set_gives_what_it_has(tokenizer):
    loaded = load("heldout", tokenizer, samples=10_000, length=4096)
    assert len(loaded.windows) < 10_000
    assert len(loaded.windows[-1]) < 4096
    everything = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in passages.shipped("heldout")]
    assert loaded.tokens == sum(len(ids) + 1 for ids in everything)


@pytest.mark.parametrize("name", ["recall", "self", "heldout"])
def test_calibration_and_check_draw_different_windows_from_the_same_seed(tokenizer, random_model, name):
    drawn = [
        as_lists(load(name, tokenizer, random_model, purpose=purpose, model_sha256="purposes", length=64).windows)
        for purpose in ("check", "calibration")
    ]
    assert not [window for window in drawn[0] if window in drawn[1]]


# --- text from the model itself


def own_text(model, seed: int = 0, samples: int = 4, length: int = 24, key: str = "own-text") -> list[list[int]]:
    return as_lists(self_text.windows(model, key, samples, length, seed))


def test_own_text_begins_with_bos_and_has_the_asked_size(random_model):
    windows = own_text(random_model)
    assert [len(window) for window in windows] == [24] * 4
    assert {window[0] for window in windows} == {random_model.config.bos_token_id}
    assert all(0 <= token < random_model.config.vocab_size for window in windows for token in window)


def test_own_text_is_the_same_for_a_seed_and_another_for_another(random_model):
    first, other = own_text(random_model, key="seeded"), own_text(random_model, seed=1, key="seeded")
    again = own_text(random_model, key="not in the cache under this name")
    assert first == again
    assert not [window for window in first if window in other]


def test_own_text_of_many_windows_repeats_none(random_model):
    windows = own_text(random_model, samples=2 * self_text.BATCH, key="many")
    assert len(windows) == 2 * self_text.BATCH
    assert len({tuple(window) for window in windows}) == len(windows)


def test_own_text_is_sampled_once_and_then_kept(random_model, monkeypatch):
    first = own_text(random_model, key="kept")
    monkeypatch.setattr(self_text, "_batch", None)  # a second sampling would call it
    assert own_text(random_model, key="kept") == first


def test_own_text_begins_anew_after_an_end_of_text(random_model):
    ends = list(range(2, 40))  # more than half of the vocabulary, so that ends are sure to come
    ending = copy.copy(random_model)
    ending.config = random_model.config.model_copy(update={"eos_token_id": ends})
    windows = own_text(ending, key="ending")
    followers = [b for window in windows for a, b in itertools.pairwise(window) if a in ends]
    assert followers
    assert set(followers) == {random_model.config.bos_token_id}


# --- recall


FACT = re.compile(r"The secret word of (\w+) is (\w+)\.")


@pytest.fixture(scope="module")
def tasks(tokenizer):
    return recall.tasks(tokenizer, passages.shipped("heldout"), samples=20, length=256, seed=0)


def test_a_recall_prompt_has_the_asked_length_and_begins_with_bos(tasks, tokenizer):
    assert {len(task.prompt) for task in tasks} == {256}
    assert {task.prompt[0] for task in tasks} == {tokenizer.bos_token_id}


def test_the_answer_to_a_recall_question_was_told_early_and_is_asked_for_at_the_end(tasks, tokenizer):
    for task in tasks:
        told = dict(FACT.findall(tokenizer.decode(task.prompt)))
        asked = re.search(r"The secret word of (\w+) is$", tokenizer.decode(task.prompt))
        assert told[asked.group(1)] == tokenizer.decode([task.answer]).strip()
        first_half = tokenizer.decode(task.prompt[:130])  # facts take at most half, and may end just beyond it
        assert asked.group(1) in dict(FACT.findall(first_half))


def test_recall_tasks_ask_for_different_words(tasks):
    assert len({task.answer for task in tasks}) > 10


def test_facts_of_one_task_contradict_each_other_nowhere(tasks, tokenizer):
    for task in tasks:
        names = [name for name, _ in FACT.findall(tokenizer.decode(task.prompt))]
        assert len(set(names)) == len(names)


def test_the_reference_model_answers_most_recall_questions(tasks, trained_model):
    logits = Decoder(trained_model, len(tasks)).step(torch.tensor([task.prompt for task in tasks]))
    right = logits.argmax(-1) == torch.tensor([task.answer for task in tasks])
    # the model's card says 0.94 to 1.00; 0.8 of 20 leaves room for the luck of 20 draws
    assert right.float().mean() >= 0.8


@pytest.mark.parametrize("length", [32, 100, 512])
def test_recall_windows_have_the_asked_length_with_the_answer_last(tokenizer, length):
    windows = load("recall", tokenizer, samples=3, length=length).windows
    assert [len(window) for window in windows] == [length] * 3
    for window in windows:
        told = dict(FACT.findall(tokenizer.decode(window[:-1].tolist())))
        name = re.search(r"The secret word of (\w+) is (\w+)$", tokenizer.decode(window.tolist()))
        assert told[name.group(1)] == name.group(2)


def test_recall_tasks_are_the_same_for_a_seed_and_others_for_another(tokenizer):
    first, again, other = (as_lists(load("recall", tokenizer, length=64, seed=s).windows) for s in (0, 0, 1))
    assert first == again
    assert not [window for window in first if window in other]


def test_a_window_too_short_for_a_fact_and_its_question_is_refused(tokenizer):
    with pytest.raises(InputError, match="too short"):
        load("recall", tokenizer, length=8)


def test_a_vocabulary_without_words_is_refused_for_recall():
    words = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 1}, bos_token_id=None)
    with pytest.raises(InputError, match="recall"):
        recall.tasks(words, ["a"], 1, 64, 0)


# --- users' files


@pytest.fixture
def write(tmp_path):
    def to_file(content: str | bytes, name: str = "mine.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def refusal(path: Path, tokenizer=None) -> str:
    with pytest.raises(InputError) as caught:
        load(path, tokenizer or Letters())
    return str(caught.value)


def test_a_text_file_is_one_passage(write, tokenizer):
    text = "One day the fox went to the river.\n\nIt was cold, and it went home.\n"
    (window,) = load(write(text, "mine.txt"), tokenizer, length=1000).windows
    assert window.tolist() == [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_a_line_of_a_jsonl_file_is_a_passage_and_blank_lines_are_skipped(write):
    lines = "".join(json.dumps({"text": text, "source": "mine"}) + "\n\n" for text in TEXTS)
    assert sorted(passages_in(as_lists(load(write(lines), Letters()).windows))) == sorted(TEXTS)


@pytest.mark.parametrize(
    "odd", ["\u2028", "\u2029", "\x85"], ids=["line separator", "paragraph separator", "next line"]
)
def test_a_jsonl_line_ends_at_a_newline_and_at_nothing_else(write, odd):
    text = f"one{odd}two"
    (window,) = load(write(json.dumps({"text": text}, ensure_ascii=False) + "\n"), Letters()).windows
    assert window.tolist() == [BOS, *map(ord, text)]


def test_a_jsonl_file_with_carriage_returns_reads_the_same(write):
    lines = "\r\n".join(json.dumps({"text": text}) for text in TEXTS)
    assert sorted(passages_in(as_lists(load(write(lines), Letters()).windows))) == sorted(TEXTS)


MESSAGES = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A fox."}]


def test_messages_go_through_the_chat_template(write, tokenizer):
    (window,) = load(write(json.dumps({"messages": MESSAGES})), tokenizer, length=1000).windows
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert "A fox." in rendered
    assert window.tolist() == [tokenizer.bos_token_id, *tokenizer(rendered, add_special_tokens=False)["input_ids"]]


def test_messages_without_a_chat_template_are_refused(write):
    assert "chat template" in refusal(write(json.dumps({"messages": MESSAGES})))


BAD_LINES = [
    "not json",
    "[1, 2]",
    '"text"',
    "{}",
    '{"text": 3}',
    '{"text": null}',
    '{"txt": "a"}',
    '{"messages": "hello"}',
    '{"messages": [1]}',
    '{"text": "a"',
    "[" * 100_000,
    '{"text": "a", "text": "b"}',
]


@pytest.mark.parametrize("line", BAD_LINES, ids=[line[:20] for line in BAD_LINES])
def test_a_bad_line_is_named_by_its_number(write, tokenizer, line):
    path = write(f'{{"text": "fine"}}\n\n{line}\n')
    message = refusal(path, tokenizer)
    assert message.startswith(f"{path}:3: ")
    assert len(message.splitlines()) == 1


WITHOUT_TEXT = [
    ("mine.txt", ""),
    ("mine.txt", "\n \n"),
    ("mine.jsonl", ""),
    ("mine.jsonl", "\n \n"),
    ("mine.jsonl", '{"text": ""}\n{"text": "  "}\n'),
]


@pytest.mark.parametrize(("name", "content"), WITHOUT_TEXT)
def test_a_file_without_text_is_refused(write, name, content):
    assert "no text" in refusal(write(content, name))


def test_text_too_short_to_score_is_refused(write):
    with pytest.raises(InputError, match="not enough text"):
        load(write("a", "mine.txt"), Letters(bos=None))


def test_a_file_that_is_not_utf_8_is_refused(write):
    assert "UTF-8" in refusal(write(b"\xff\xfe\x00", "mine.txt"))


def test_a_file_of_another_kind_is_refused(write):
    assert ".jsonl" in refusal(write("a,b\n", "mine.csv"))


def test_a_name_that_is_neither_a_file_nor_a_set_is_refused_with_the_nearest_set():
    with pytest.raises(InputError, match="did you mean 'heldout'"):
        load("heldot", Letters())


def test_a_file_is_sought_beside_the_recipe_first(write, tmp_path, monkeypatch):
    write("beside", "mine.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.txt").write_text("elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert passages_in(as_lists(load("mine.txt", Letters(), folder=tmp_path).windows)) == ["beside"]
    assert passages_in(as_lists(load("mine.txt", Letters()).windows)) == ["elsewhere"]


@pytest.mark.parametrize("content", ["not json\n", '{"messages": []}\n', ""], ids=["bad line", "no template", "empty"])
def test_an_unusable_file_is_refused_before_any_work(write, tiny, monkeypatch, content):
    monkeypatch.setattr(prompts, "load_tokenizer", lambda folder: Letters())
    with pytest.raises(InputError):
        prompts.refuse_unusable(str(write(content)), tiny, length=16)
