"""Text as it comes: BOS that is there already, chats with all their arguments, templates that fail or do not end, texts too
long to tokenize whole, and bytes that are no text. The reference is transformers' own `apply_chat_template` and tokenizer."""

import json
import logging
import os
import random
import threading
from pathlib import Path

import psutil
import pytest
from jamba_models import make_jamba
from refusals import refusal
from text_models import changed_copy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compress import prompts
from compress.prompts import chat, passages
from compress.prompts.windows import encode, encode_start, join_and_cut
from compress.recipe.source import load_tokenizer

HI = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A fox."}]
PLAIN = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
ALL_OF_IT = (
    "{{ bos_token }}{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}"
    "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.type }}] {{ part.text }}{% endfor %}{% endif %}\n{% endfor %}"
    "{% if thinking %}(thinks){% endif %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture
def with_template(tiny, tmp_path):
    return lambda template: load_tokenizer(changed_copy(tiny, tmp_path / "model", template=template))


@pytest.fixture
def write(tmp_path):
    def to_file(content, name: str = "mine.jsonl") -> Path:
        path = tmp_path / name
        raw = content if isinstance(content, bytes) else "\n".join(json.dumps(line) for line in content).encode()
        path.write_bytes(raw)
        return path

    return to_file


def window(path: Path, tokenizer) -> list[int]:
    """All tokens of a file."""
    (only,) = join_and_cut(tokenizer, passages.from_file(path, tokenizer), samples=1, length=100_000, seed=0)
    return only.tolist()


def templated(tokenizer, messages: list, **options) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"]


# ---- BOS


@pytest.mark.parametrize("template", ["{{ bos_token }}" + PLAIN, "<s>" + PLAIN, "\n{{ bos_token }}" + PLAIN])
def test_a_template_that_writes_bos_gets_no_second_one(with_template, write, template):
    tokenizer = with_template(template)
    ids = window(write([{"messages": HI}]), tokenizer)
    assert ids == templated(tokenizer, HI)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_without_bos_is_begun_with_it(with_template, write):
    tokenizer = with_template(PLAIN)
    assert window(write([{"messages": HI}]), tokenizer) == [tokenizer.bos_token_id, *templated(tokenizer, HI)]


def test_a_text_that_begins_with_bos_gets_no_second_one(tokenizer, write):
    text = "<s>Once upon a time </s> there was <s>"
    ids = window(write(text.encode(), "mine.txt"), tokenizer)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1], ids.count(tokenizer.eos_token_id)) == (1, 1, 1)


def test_joined_passages_begin_each_with_one_bos(tokenizer, write):
    ids = window(write([{"text": "<s>One."}, {"text": "Two."}, {"text": "<s>Three."}]), tokenizer)
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 3)


# ---- chats as they are


PARTS = [{"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "text", "text": "And why?"}]}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
DOCUMENTS = [{"title": "Foxes", "text": "They are red."}]


@pytest.mark.parametrize("line, options", [
    ({"messages": PARTS}, {}),
    ({"messages": PARTS, "tools": TOOLS}, {"tools": TOOLS}),
    ({"messages": HI, "documents": DOCUMENTS}, {"documents": DOCUMENTS}),
    ({"messages": HI[:1], "add_generation_prompt": True}, {"add_generation_prompt": True}),
    ({"messages": HI, "chat_template_kwargs": {"thinking": True}}, {"thinking": True}),
    ({"messages": HI, "tools": None, "documents": None, "source": "mine", "id": 3}, {}),
], ids=["parts", "tools", "documents", "generation prompt", "more arguments", "null and other keys"])  # fmt: skip
def test_what_a_line_says_reaches_the_template_as_it_is(with_template, write, line, options):
    tokenizer = with_template(ALL_OF_IT)
    ids = window(write([line]), tokenizer)
    assert ids == templated(tokenizer, line["messages"], **options)
    if options:
        assert ids != templated(tokenizer, line["messages"])


def test_chats_and_texts_keep_their_order(with_template, write):
    path = write([{"text": "one"}, {"messages": HI[:1]}, {"text": "two"}, {"messages": HI[1:]}])
    assert passages.from_file(path, with_template(PLAIN)) == ["one", "Who are you?\n", "two", "A fox.\n"]


@pytest.mark.parametrize("line, named", [
    ({"messages": []}, "messages"),
    ({"messages": [HI]}, "messages"),
    ({"messages": HI, "tools": "[]"}, "tools"),
    ({"messages": HI, "tools": ["look"]}, "tools"),
    ({"messages": HI, "documents": {}}, "documents"),
    ({"messages": HI, "add_generation_prompt": 1}, "add_generation_prompt"),
    ({"messages": HI, "chat_template_kwargs": {"tokenize": True}}, "tokenize"),
    ({"messages": [{"role": "user", "content": "a\ud800"}]}, "U+D800"),
    ({"text": "ab\udc80c"}, "U+DC80 at character 3"),
])  # fmt: skip
def test_a_line_that_cannot_be_meant_so_is_named(tokenizer, write, line, named):
    path = write([{"text": "fine"}, line])
    message = refusal(lambda: passages.from_file(path, tokenizer))
    assert message.startswith(f"{path}:2: ") and named in message


# ---- templates that fail or do not end


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"


def failing(with_template, write, template: str) -> str:
    path, tokenizer = write([{"text": "fine"}, {"messages": HI}]), with_template(template)
    message = refusal(lambda: passages.from_file(path, tokenizer))
    assert message.startswith(f"{path}:2: the chat template ")
    assert psutil.Process().children() == []
    return message


@pytest.mark.parametrize("template, said", [
    ("{{ 1 / 0 }}", "division by zero"),
    ("{% if %}", "refuses"),
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ("{{ 'x' * 10 ** 12 }}", "MemoryError"),
    ("{{ 'x' * 7 * 10 ** 7 }}", "more than"),
], ids=["divides by zero", "is malformed", "raises", "recurses", "fills the memory", "writes too much"])  # fmt: skip
def test_a_template_that_fails_is_refused_by_line(with_template, write, template, said):
    assert said in failing(with_template, write, template)


def test_a_template_that_does_not_end_is_ended(with_template, write, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    assert "does not end" in failing(with_template, write, ENDLESS)


def test_the_limits_hold_outside_the_main_thread(with_template, write, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.3)
    said = []
    thread = threading.Thread(target=lambda: said.append(failing(with_template, write, ENDLESS)))
    thread.start()
    thread.join(20)
    assert "does not end" in said[0]


def test_the_command_refuses_such_a_template_with_exit_code_2(compress_cli, tiny, tmp_path, write):
    model = changed_copy(tiny, tmp_path / "model", weights=True, template="{{ 1 / 0 }}")
    path = write([{"messages": HI}])
    result = compress_cli("check", model, model, "--prompts", path)
    assert result.exit_code == 2
    assert f"{path}:1" in result.stderr and len(result.stderr.splitlines()) == 1


# ---- long texts


def unspaced(seed: int, count: int, letters: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(letters) for _ in range(count))


LONG = {
    "prose": "Once upon a time, there wasn't a fox; </s> it said \u201cno\u201d.\n\n" * 2500,
    "no spaces": unspaced(0, 150_000),
    "long words": " ".join(unspaced(seed, 20_000) for seed in range(6)),
    "unicode": unspaced(1, 120_000, "日本語🦊🏳️‍🌈é e\u0301\u2028ß"),
    "one letter": "a" * 150_001,
    "spaces": " " * 150_000,
    "combining": "e\u0301" * 70_000,
}


@pytest.fixture(scope="module")
def tokenizers(tokenizer) -> dict:
    """The reference model's (BPE over the whole text), one over bytes of words, and one that weighs whole sentences."""
    texts = passages.shipped("prose")
    special = {"special_tokens": ["<s>", "</s>"], "show_progress": False}
    by_bytes = Tokenizer(models.BPE())
    by_bytes.pre_tokenizer, by_bytes.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    by_bytes.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=800, **special))
    unigram = Tokenizer(models.Unigram())
    unigram.train_from_iterator(texts[:20], trainers.UnigramTrainer(vocab_size=400, unk_token="</s>", **special))
    made = [PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<s>") for t in (by_bytes, unigram)]
    return dict(zip(("whole text", "bytes of words", "unigram"), [tokenizer, *made], strict=True))


@pytest.mark.parametrize("kind", ["whole text", "bytes of words", "unigram"])
@pytest.mark.parametrize("name", list(LONG))
def test_the_first_tokens_of_a_long_text_are_those_of_the_whole(tokenizers, kind, name):
    whole = encode(tokenizers[kind], LONG[name])
    for count in (1, 16, 777, 5000):
        assert encode_start(tokenizers[kind], LONG[name], count)[:count] == whole[:count]


def test_a_text_of_many_megabytes_is_not_tokenized_whole(tokenizer):
    class Counted:
        bos_token, bos_token_id, seen = "<s>", 1, 0

        def __call__(self, text: str, **options):
            self.seen += len(text)
            return tokenizer(text, **options)

    counted = Counted()
    (only,) = join_and_cut(counted, ["Once upon a time there was a fox. " * 300_000], samples=1, length=16, seed=0)
    assert only.tolist() == encode(tokenizer, "Once upon a time there was a fox. " * 10)[:16]
    assert counted.seen < 50_000


def test_a_short_text_is_whole_whatever_is_asked(tokenizer):
    text = passages.shipped("heldout")[0]
    assert encode_start(tokenizer, text, 10_000) == encode(tokenizer, text)


# ---- bytes


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfone\ntwo", b"one\r\ntwo", b"one\rtwo", b"\xef\xbb\xbfone\r\ntwo"])
def test_a_byte_order_mark_and_carriage_returns_are_no_text(tokenizer, write, raw):
    assert passages.from_file(write(raw, "mine.txt"), tokenizer) == ["one\ntwo"]


def test_jsonl_files_with_byte_order_marks_that_were_joined_are_read(tokenizer, write):
    line = b'\xef\xbb\xbf{"text": "one"}\r\n'
    assert passages.from_file(write(line + b"\xef\xbb\xbf\r\n" + line), tokenizer) == ["one", "one"]


@pytest.mark.parametrize("raw", ["one".encode("utf-16"), "one".encode("utf-16-le"), b"a\0b", b"\xe9t\xe9"])
def test_what_is_no_utf_8_is_refused(tokenizer, write, raw):
    path = write(raw, "mine.txt")
    assert refusal(lambda: passages.from_file(path, tokenizer)).startswith(f"{path}: not UTF-8 text")


def test_a_file_of_prompts_that_was_not_fetched_is_refused(tokenizer, write):
    path = write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "mine.txt")
    assert "git-lfs" in refusal(lambda: passages.from_file(path, tokenizer))


def test_a_prompt_file_whose_name_is_not_utf_8_is_used_and_named(compress_cli, small, tiny, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("Once upon a time there was a fox who lived by the river, and it was cold. " * 4)
    result = compress_cli("check", tiny, tiny, "--prompts", path, "--samples", 1, "--length", 32, "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["prompts"][0]["name"].endswith(r"caf\xe9.txt")


# ---- longer than the model


def test_windows_longer_than_the_model_was_made_for_are_warned_of(compress_cli, tiny, tmp_path, caplog, monkeypatch):
    model = changed_copy(
        tiny, tmp_path / "model", weights=True,
        config={"max_position_embeddings": 24}, tokenizer_config={"model_max_length": 24},
    )  # fmt: skip
    logger = logging.getLogger("transformers")  # which does not hand on to the root logger
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, caplog.handler])
    result = compress_cli("check", model, model, "--samples", 1, "--length", 32, "--json", "-")
    (used,) = json.loads(result.stdout)["prompts"]
    assert "32" in used["warning"] and "max_position_embeddings" in used["warning"]
    assert "max_position_embeddings" in result.stderr
    assert "indexing errors" not in result.stderr + caplog.text


def test_calibration_beyond_the_model_s_length_is_warned_of_in_the_report(compress_cli, tmp_path):
    model = make_jamba(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=16)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "version: 1\ncalibration: {prompts: [self], samples: 2, length: 20}\n"
        "passes: [{quantize: {method: gptq, weights: int8, min_tokens: 1}}]\n"
    )
    result = compress_cli("apply", recipe, "-m", model, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    (warning,) = json.loads((tmp_path / "out" / "report.json").read_text())["calibration"]["warnings"]
    assert warning.startswith("self: 20 tokens") and "max_position_embeddings" in warning
    assert warning in (tmp_path / "out" / "report.md").read_text()


def test_windows_that_fit_are_not_warned_of(tokenizer):
    loaded = prompts.load("heldout", purpose="check", tokenizer=tokenizer, model=None, model_sha256="", samples=1,
                          length=8192, seed=0)  # fmt: skip
    assert prompts.used([loaded]) == [{"name": "heldout", "windows": 1, "tokens": 8192}]
