"""`run`: the text is that of transformers' greedy generation, arrives piece by piece, and never shows half a character."""

from pathlib import Path

import pytest
import torch
from jamba_models import load_reference

from compress.apply import exporting
from compress.recipe.source import load_tokenizer
from compress.runtime.artifacts import open_artifact
from compress.studies import generation

TOKENS = 16
PROMPTS = {
    "prose": "Once upon a time there was a fox who lived by the river, and",
    "recall": "\n\nThe secret word of Tom is water.\n\nThe fox went home and slept.\n\nThe secret word of Tom is",
    "nothing": "",
}


@pytest.fixture(scope="module")
def artifacts(tiny, tmp_path_factory) -> dict[str, Path]:
    """The reference model in its original precision, as a checkpoint and as a graph."""
    return {"checkpoint": tiny, "onnx": exporting.export_checkpoint(tiny, "onnx", tmp_path_factory.mktemp("run") / "x")}


@pytest.fixture(scope="module")
def greedy(tiny) -> dict[str, str]:
    """What transformers generates from each prompt, without the prompt."""
    model, tokenizer = load_reference(tiny), load_tokenizer(tiny)
    return {name: continuation(model, tokenizer, prompt) for name, prompt in PROMPTS.items()}


def continuation(model, tokenizer, prompt: str) -> str:
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    given = torch.tensor([ids])
    with torch.inference_mode():
        result = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=TOKENS)
    return tokenizer.decode(result[0, len(ids) :], skip_special_tokens=True)


def run(compress_cli, artifact: Path, *arguments, **options) -> str:
    result = compress_cli("run", artifact, *arguments, **options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
@pytest.mark.parametrize("name", list(PROMPTS))
def test_the_text_is_that_of_transformers_greedy_generation(compress_cli, artifacts, greedy, kind, name):
    assert run(compress_cli, artifacts[kind], PROMPTS[name], "--max-tokens", TOKENS) == greedy[name] + "\n"


def test_the_model_remembers_what_it_was_told(greedy):
    assert greedy["recall"].split()[0].startswith("water")


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_no_prompt_begins_with_an_empty_text(compress_cli, artifacts, greedy, kind):
    assert run(compress_cli, artifacts[kind], "--max-tokens", TOKENS) == greedy["nothing"] + "\n"


def test_a_dash_reads_the_prompt_from_standard_input(compress_cli, artifacts, greedy):
    text = run(compress_cli, artifacts["onnx"], "-", "--max-tokens", TOKENS, input=PROMPTS["prose"])
    assert text == greedy["prose"] + "\n"


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_a_seed_makes_sampling_repeatable(compress_cli, artifacts, kind):
    def sampled(seed: int) -> str:
        arguments = (PROMPTS["prose"], "--temperature", 1.5, "--seed", seed, "--max-tokens", TOKENS)
        return run(compress_cli, artifacts[kind], *arguments)

    texts = [sampled(seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_without_temperature_the_seed_changes_nothing(compress_cli, artifacts, greedy):
    text = run(compress_cli, artifacts["onnx"], PROMPTS["prose"], "--seed", 3, "--max-tokens", TOKENS)
    assert text == greedy["prose"] + "\n"


def test_an_output_folder_runs_its_graph(compress_cli, applied):
    arguments = (PROMPTS["prose"], "--max-tokens", 4)
    graph = run(compress_cli, applied / "onnx" / "model.onnx", *arguments)
    assert run(compress_cli, applied, *arguments) == graph
    assert run(compress_cli, applied / "onnx", *arguments) == graph


def told(compress_cli, artifact: Path) -> str:
    result = compress_cli("run", artifact, PROMPTS["prose"], "--max-tokens", 2)
    assert result.exit_code == 0, result.stderr
    return result.stderr


def test_of_an_output_folder_it_is_told_which_artifact_runs(compress_cli, applied):
    assert told(compress_cli, applied) == f"compress: {applied / 'onnx' / 'model.onnx'} (int8, onnxruntime)\n"


def test_what_was_named_itself_is_not_told(compress_cli, applied):
    for part in (applied / "onnx", applied / "onnx" / "model.onnx", applied / "checkpoint"):
        assert told(compress_cli, part) == ""


def test_the_formats_that_are_told_are_those_that_hold_the_weights(compress_cli, tiny, tmp_path):
    recipe = "version: 1\npasses: [quantize: {weights: int4-g32, roles: {lm_head: int8, experts: fp8-e4m3}}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert compress_cli("apply", tmp_path / "recipe.yaml", "-m", tiny, "-o", tmp_path / "out").exit_code == 0
    said = told(compress_cli, tmp_path / "out")
    assert said.startswith(f"compress: {tmp_path / 'out' / 'checkpoint'} (fp8-e4m3, int4-g32, ")
    assert said.endswith(", torch)\n")
    assert "bf16" not in said


def test_a_compressed_checkpoint_still_remembers(compress_cli, applied):
    for part in ("checkpoint", "onnx"):
        text = run(compress_cli, applied / part, PROMPTS["recall"], "--max-tokens", 2)
        assert text.split()[0].startswith("water")


@pytest.mark.parametrize("arguments", [("--max-tokens", "0"), ("--temperature", "-1"), ("--seed", "-1")])
def test_settings_that_make_no_sense_are_refused(compress_cli, artifacts, arguments):
    result = compress_cli("run", artifacts["onnx"], "hello", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_an_artifact_without_a_tokenizer_is_refused(compress_cli, small):
    result = compress_cli("run", small, "hello")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "tokenizer" in result.stderr


# --- streaming, with tokens that are bytes


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8; 0 ends a text."""

    bos_token_id, eos_token_id = 1, 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture
def pieces(monkeypatch, tiny):
    """The pieces of text that are shown for given tokens, and how many tokens were taken by each."""

    def stream(tokens: bytes, tokenizer=None) -> list[tuple[str, int]]:
        taken = []

        def counted(*arguments):
            for token in tokens:
                taken.append(token)
                yield token

        monkeypatch.setattr(generation, "load_tokenizer", lambda folder: tokenizer or Bytes())
        monkeypatch.setattr(generation, "stream_tokens", counted)
        shown = generation.stream_text(tiny, "hello", max_tokens=99, temperature=0, seed=0)
        return [(piece, len(taken)) for piece in shown]

    return stream


TEXT = "naïve 🦊 日本 e\u0301"


def test_characters_of_several_tokens_are_shown_whole(pieces):
    shown = [piece for piece, _ in pieces(TEXT.encode())]
    assert "".join(shown) == TEXT
    assert not any("\ufffd" in piece for piece in shown)


def test_text_is_shown_as_soon_as_a_character_is_whole(pieces):
    assert pieces("aé🦊b".encode()) == [("a", 1), ("é", 3), ("🦊", 7), ("b", 8)]


def test_a_character_that_was_cut_off_at_the_end_is_not_shown(pieces):
    assert "".join(piece for piece, _ in pieces("ab🦊".encode()[:-1])) == "ab"


def test_text_goes_on_after_bytes_that_are_no_character(pieces):
    assert "".join(piece for piece, _ in pieces(b"a\xffb")) == "a\ufffdb"


def test_the_text_ends_at_an_end_of_text_token(pieces):
    shown = pieces(b"ab\x00cd")
    assert "".join(piece for piece, _ in shown) == "ab"
    assert shown[-1][1] <= 3


def test_an_empty_prompt_without_a_bos_to_begin_with_is_refused(compress_cli, artifacts, monkeypatch):
    class WithoutBos(Bytes):
        bos_token_id = None

    monkeypatch.setattr(generation, "load_tokenizer", lambda folder: WithoutBos())
    result = compress_cli("run", artifacts["onnx"])
    assert (result.exit_code, result.stdout.strip()) == (2, "")
    assert "empty" in result.stderr


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_max_tokens_is_how_many_tokens_there_are(artifacts, kind):
    path = artifacts[kind] / "model.onnx" if kind == "onnx" else artifacts[kind]
    assert len(list(generation.stream_tokens(open_artifact(path), [1, 50, 60], 5, 0.0, 0))) == 5


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_a_prompt_longer_than_a_block_says_the_same(compress_cli, artifacts, greedy, monkeypatch, kind):
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 5)
    assert run(compress_cli, artifacts[kind], PROMPTS["recall"], "--max-tokens", TOKENS) == greedy["recall"] + "\n"


def test_a_prompt_that_is_not_text_is_refused(compress_cli, tiny):
    result = compress_cli("run", tiny, "-", input=b"\xff\xfeabc")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
