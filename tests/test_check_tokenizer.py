"""What ships beside the weights: a candidate with another tokenizer, or with a genai_config.json that is not its own."""

import json
import shutil
from pathlib import Path

import pytest
from refusals import refusal_of_command
from text_models import changed_copy
from transformers import AutoTokenizer

from compress.apply import exporting

QUICK = ("--prompts", "self", "--samples", "1", "--length", "8")


@pytest.fixture
def checkpoint(tiny, tmp_path) -> Path:
    """A copy of the reference model."""
    return Path(shutil.copytree(tiny, tmp_path / "candidate"))


@pytest.fixture
def graph(applied, tmp_path) -> Path:
    """A graph on its own, without the manifest that would notice every change."""
    return Path(shutil.copytree(applied / "onnx", tmp_path / "graph"))


def edit(folder: Path, name: str, change) -> None:
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def tokenizer(change):
    return lambda folder: edit(folder, "tokenizer.json", change)


def settings(**changes):
    return lambda folder: edit(folder, "tokenizer_config.json", lambda values: values.update(changes))


def exchange_tokens(values: dict) -> None:
    vocab = values["model"]["vocab"]
    first, second = list(vocab)[700:702]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def exchange_merges(values: dict) -> None:
    merges = values["model"]["merges"]
    merges[40], merges[41] = merges[41], merges[40]


def normalize_first(step: dict):
    def change(values: dict) -> None:
        values["normalizer"] = {"type": "Sequence", "normalizers": [step, values["normalizer"]]}

    return change


ADDED = {"id": 2048, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
OTHERS = {
    "a token has another id": (tokenizer(exchange_tokens), "vocabulary"),
    "merges in another order": (tokenizer(exchange_merges), "merges"),
    "lower case": (tokenizer(normalize_first({"type": "Lowercase"})), "normalizer"),
    "a word replaced": (
        tokenizer(normalize_first({"type": "Replace", "pattern": {"String": "fox"}, "content": "dog"})),
        "normalizer",
    ),
    "digits apart": (
        tokenizer(lambda values: values.update(pre_tokenizer={"type": "Digits", "individual_digits": True})),
        "pre-tokenizer",
    ),
    "another token": (tokenizer(lambda v: v["added_tokens"].append(ADDED | {"special": True})), "vocabulary"),
    "a special token that strips": (tokenizer(lambda v: v["added_tokens"][1].update(lstrip=True)), "added tokens"),
    "no BOS before a text": (tokenizer(lambda values: values.update(post_processor=None)), "other ids"),
    "another end of text": (settings(eos_token="<pad>"), "eos token"),
    "special tokens in text are text": (settings(split_special_tokens=True), "other ids"),
    "another chat template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}"),
        "chat template",
    ),
    "no chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
}


@pytest.mark.parametrize(("change", "said"), OTHERS.values(), ids=list(OTHERS))
def test_a_tokenizer_that_gives_other_ids_is_refused(compress_cli, tiny, checkpoint, change, said):
    change(checkpoint)
    message = refusal_of_command(compress_cli("check", tiny, checkpoint, *QUICK))
    assert str(checkpoint) in message
    assert said in message


def test_the_tokenizer_of_a_graph_is_compared_too(compress_cli, tiny, graph):
    tokenizer(exchange_merges)(graph)
    assert "merges" in refusal_of_command(compress_cli("check", tiny, graph / "model.onnx", *QUICK))


def into_config(folder: Path) -> None:
    template = folder / "chat_template.jinja"
    settings(chat_template="{# the same #}" + template.read_text())(folder)
    template.unlink()


def saved_again(folder: Path) -> None:
    loaded = AutoTokenizer.from_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    loaded.save_pretrained(folder)


def cut_and_padded(values: dict) -> None:
    values["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}


SAME = {
    "other bytes": tokenizer(lambda values: None),
    "code for another class": settings(auto_map={"AutoTokenizer": ["code.Tokenizer", None]}),
    "another longest text": settings(model_max_length=16),
    "truncation left by a script": tokenizer(cut_and_padded),
    "a sequence of one normalizer": tokenizer(
        lambda v: v.update(normalizer={"type": "Sequence", "normalizers": [v["normalizer"]]})
    ),
    "the template elsewhere, with a comment": into_config,
    "saved by transformers": saved_again,
}


@pytest.mark.parametrize("change", SAME.values(), ids=list(SAME))
def test_a_tokenizer_that_means_the_same_passes(compress_cli, tiny, checkpoint, change):
    change(checkpoint)
    result = compress_cli("check", tiny, checkpoint, *QUICK)
    assert result.exit_code == 0, result.output


DAMAGED = {
    "tokenizer.json": [b'{"version": "1.0"', b'{"a": 1}', b"\xff\xfe", b""],
    "tokenizer_config.json": [b"[]", b"{", b"version https://git-lfs"],
    "special_tokens_map.json": [b"nothing"],
    "chat_template.jinja": [b"\xff\xfe"],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in DAMAGED for content in DAMAGED[name]])
def test_a_damaged_file_of_the_tokenizer_is_named(compress_cli, tiny, checkpoint, name, content):
    (checkpoint / name).write_bytes(content)
    assert f"{checkpoint / name}: " in refusal_of_command(compress_cli("check", tiny, checkpoint, *QUICK))


def test_a_candidate_without_a_tokenizer_is_allowed_where_no_text_is_needed(compress_cli, tiny, checkpoint):
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    assert compress_cli("check", tiny, checkpoint, *QUICK).exit_code == 0
    text = ("--prompts", "heldout", "--samples", 1, "--length", 8)
    assert "no tokenizer" in refusal_of_command(compress_cli("check", tiny, checkpoint, *text))


# --- genai_config.json


def genai(**changes):
    return lambda folder: edit(folder, "genai_config.json", lambda values: values["model"].update(changes))


def other_file(folder: Path) -> None:
    edit(folder, "genai_config.json", lambda values: values["model"]["decoder"].update(filename="decoder.onnx"))


BROKEN = {
    "not JSON": lambda folder: (folder / "genai_config.json").write_text("{"),
    "a list": lambda folder: (folder / "genai_config.json").write_text("[]"),
    "no decoder": genai(decoder=None),
    "of another file": other_file,
    "another vocabulary": genai(vocab_size=99),
    "an end of text that is no token": genai(eos_token_id=2048),
    "ends of text that are not the model's": genai(eos_token_id=[5, 6]),
    "another BOS": genai(bos_token_id=2),
    "an id that is text": genai(pad_token_id="0"),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_genai_config_is_named(compress_cli, tiny, graph, change):
    change(graph)
    assert f"{graph / 'genai_config.json'}: " in refusal_of_command(compress_cli("check", tiny, graph, *QUICK))


@pytest.mark.parametrize(
    "change",
    [genai(), genai(eos_token_id=[2, 7]), lambda folder: (folder / "genai_config.json").unlink()],
    ids=["as written", "more ends of text", "none"],
)
def test_a_graph_whose_genai_config_fits_passes(compress_cli, tiny, graph, change):
    change(graph)
    result = compress_cli("check", tiny, graph, *QUICK)
    assert result.exit_code == 0, result.output


def test_ids_that_a_model_names_beyond_its_vocabulary_do_not_make_its_own_export_look_broken(
    compress_cli, tiny, tmp_path
):
    beyond = {"pad_token_id": 2048, "eos_token_id": [2, 2049]}
    model = changed_copy(
        tiny, tmp_path / "model", weights=True, config=beyond, generation_config={"eos_token_id": 2050}
    )
    graph = exporting.export_checkpoint(model, "onnx", tmp_path / "graph")
    assert json.loads((graph / "genai_config.json").read_text())["model"]["eos_token_id"] == 2
    result = compress_cli("check", model, graph, *QUICK)
    assert result.exit_code == 0, result.output
