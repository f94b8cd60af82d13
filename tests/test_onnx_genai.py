"""onnxruntime-genai runs the exported folder as it is and says what our own session says."""

import json
from pathlib import Path

import numpy as np
import pytest
from jamba_models import make_jamba
from nemotron_h_models import VARIANTS, make_nemotron_h
from state_models import ALL, with_states

from compress.apply import exporting
from compress.checkpoint.reader import Checkpoint
from compress.recipe import resources
from compress.recipe.source import load_tokenizer
from compress.runtime.onnx_session import OnnxSession
from exporters.onnx import Onnx

genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")

STEPS = 20
EXPORTER = Onnx(Onnx.Options())


@pytest.fixture(scope="module")
def folder(applied) -> Path:
    return applied / "onnx"


@pytest.fixture(scope="module")
def loaded(folder):
    return genai.Model(str(folder))


@pytest.fixture(scope="module")
def sentences(tiny) -> list[list[int]]:
    """Tokens of eight held-out passages."""
    tokenizer = load_tokenizer(tiny)
    lines = (resources.folder("calibration_data") / "heldout.jsonl").read_text().splitlines()[:8]
    return [tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"] for line in lines]


def genai_greedy(model, prompts: np.ndarray, steps: int) -> list[list[int]]:
    """The tokens genai adds to each row; a sequence that has ended is filled up to the longest."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=prompts.shape[1] + steps, batch_size=len(prompts), do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.ascontiguousarray(prompts, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(t) for t in generator.get_sequence(row)[prompts.shape[1] :]] for row in range(len(prompts))]


def own_greedy(path: Path, prompts: np.ndarray, steps: int) -> list[list[int]]:
    generation, ids, chosen = OnnxSession(path).start(len(prompts)), prompts, []
    for _ in range(steps):
        ids = generation.step(ids)[:, -1].argmax(-1)[:, None]
        chosen.append(ids)
    return np.concatenate(chosen, 1).tolist()


def until(tokens: list[int], end: int) -> list[int]:
    """Up to and without the end-of-text token: what follows it is nobody's promise."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def assert_likely(path: Path, prompt: list[int], added: list[int]):
    """Every added token is our own session's choice at its place, or nearly so.

    For where products run in other shapes than ours: a sum in another order can turn one 8-bit rounding of an input, and
    those move the reference model's logits by up to 0.6 by themselves. A wrong state costs several logits.
    """
    added = until(added, 2)
    logits = OnnxSession(path).start(1).step(np.array([prompt + added]))[0]
    at = logits[len(prompt) - 1 : -1]
    missed = at.max(-1) - at[np.arange(len(added)), added]
    assert missed.max() <= 1.0, f"after a prompt of {len(prompt)} tokens: {np.round(missed, 2)}"


def assert_same_text(ours: list[list[int]], theirs: list[list[int]], end: int = 2):
    for a, b in zip(ours, theirs, strict=True):
        assert until(a, end) == until(b, end)


@pytest.mark.parametrize("length", [1, 40, 300])
def test_genai_generates_what_our_own_session_generates(loaded, folder, sentences, length):
    prompts = np.array([(sentences[0] * 4)[:length]])
    ours = own_greedy(folder / "model.onnx", prompts, STEPS)
    assert len(until(ours[0], 2)) == STEPS
    assert genai_greedy(loaded, prompts, STEPS) == ours


def test_genai_generates_a_batch_of_equal_lengths_as_our_own_session_does(loaded, folder, sentences):
    prompts = np.array([sentence[:30] for sentence in sentences[:3]])
    ours = own_greedy(folder / "model.onnx", prompts, STEPS)
    assert_same_text(genai_greedy(loaded, prompts, STEPS), ours)


def test_genai_generates_a_batch_of_unequal_lengths_as_each_alone(loaded, folder, sentences):
    """genai pads on the right and masks the padding; the tokens after it must still see the last real ones."""
    lengths = (60, 40, 29, 20, 12, 10, 5, 3)
    prompts = [sentence[:n] for sentence, n in zip(sentences, lengths, strict=True)]
    padded = np.array([prompt + [0] * (60 - len(prompt)) for prompt in prompts])
    for prompt, added in zip(prompts, genai_greedy(loaded, padded, STEPS), strict=True):
        assert_likely(folder / "model.onnx", prompt, added)


def test_genai_continues_a_conversation_from_its_states(loaded, folder, sentences):
    """Tokens appended piece by piece, as turns of a chat are."""
    prompt = sentences[0][:50]
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=50 + STEPS, do_sample=False)
    generator = genai.Generator(loaded, parameters)
    for piece in (prompt[:20], prompt[20:21], prompt[21:]):
        generator.append_tokens(np.array([piece], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[:50].tolist() == prompt
    assert_likely(folder / "model.onnx", prompt, generator.get_sequence(0)[50:].tolist())


def test_genai_tokenizes_as_the_models_tokenizer_does(loaded, tiny):
    text = 'The secret word of Alice is morning.\n\nShe looked up; "Oh dear!" cried the Rabbit -- café, 1865.'
    ids = genai.Tokenizer(loaded).encode(text)
    assert list(ids) == load_tokenizer(tiny)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attn_layer_period": 8, "attn_layer_offset": 7},  # no attention at all
        {"attn_layer_period": 1, "attn_layer_offset": 0},  # nothing but attention
        {"attn_layer_offset": 0},
        {"mamba_d_conv": 2, "num_key_value_heads": 5},
    ],
)
def test_genai_runs_every_pattern_of_layers(tmp_path, changes):
    """Without an end-of-text token, so that the random model goes on to the last step."""
    source = make_jamba(tmp_path / "source", spread=0.7, eos_token_id=66, **changes)
    out = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx")
    prompts = np.random.default_rng(1).integers(3, 66, (1, 12))
    ours, theirs = own_greedy(out / "model.onnx", prompts, 8), genai_greedy(genai.Model(str(out)), prompts, 8)
    assert_same_text(theirs, ours, end=66)
    assert len(until(theirs[0], 66)) > 1


@pytest.mark.parametrize("variant", ["awkward", "no attention", "attention first", "no Mamba"])
def test_genai_runs_nemotron_h(tmp_path, variant):
    """A prompt of two chunks; layers without any state, and the first state of either kind in another place."""
    source = make_nemotron_h(tmp_path / "source", **VARIANTS[variant], eos_token_id=66)
    out = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx")
    prompts = np.random.default_rng(1).integers(3, 66, (1, 70))
    ours, theirs = own_greedy(out / "model.onnx", prompts, 8), genai_greedy(genai.Model(str(out)), prompts, 8)
    assert_same_text(theirs, ours, end=66)
    assert len(until(theirs[0], 66)) > 1


# genai_config.json


def config_of(folder: Path) -> dict:
    return json.loads((folder / "genai_config.json").read_text())


def test_genai_config_describes_the_reference_model(folder):
    config = config_of(folder)
    model, decoder = config["model"], config["model"]["decoder"]
    assert model["type"] == "decoder"  # genai has no type for Jamba; this one takes states by the graph's names
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, 2, 0)
    assert (model["context_length"], model["vocab_size"]) == (8192, 2048)
    assert (folder / decoder["filename"]).is_file()
    sizes = ("hidden_size", "head_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    assert tuple(decoder[name] for name in sizes) == (160, 32, 5, 1, 8)


def test_genai_config_names_the_graphs_inputs_and_outputs(folder):
    decoder = config_of(folder)["model"]["decoder"]
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert decoder["outputs"] == {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }


def test_genai_config_searches_greedily_up_to_the_context_length(folder):
    search = config_of(folder)["search"]
    assert (search["max_length"], search["do_sample"], search["past_present_share_buffer"]) == (8192, False, False)


def test_genai_config_leaves_out_special_tokens_a_model_does_not_have(tmp_path):
    """genai refuses null; several end-of-text tokens are a list."""
    source = make_jamba(tmp_path / "source", num_hidden_layers=3)
    config = json.loads((source / "config.json").read_text())
    config |= {"bos_token_id": None, "pad_token_id": None, "eos_token_id": [2, 5]}
    (source / "config.json").write_text(json.dumps(config))
    out = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx")
    model = config_of(out)["model"]
    assert model["eos_token_id"] == [2, 5]
    assert not {"bos_token_id", "pad_token_id"} & model.keys()
    assert len(genai_greedy(genai.Model(str(out)), np.array([[7, 8, 9]]), 3)[0]) >= 1


def test_ids_that_are_no_tokens_are_not_told_to_genai_and_our_own_artifact_passes_the_check(tmp_path, compress_cli):
    """-1 stands for none; a padding token beyond the vocabulary is what a tokenizer was given and the model was not."""
    source = make_jamba(tmp_path / "source", num_hidden_layers=3)
    for file in ("config.json", "generation_config.json"):
        values = json.loads((source / file).read_text())
        ids = {"pad_token_id": 67, "eos_token_id": [2, 67, -1]}
        (source / file).write_text(json.dumps(values | ids))
    out = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx")
    model = config_of(out)["model"]
    assert (model["eos_token_id"], model.get("pad_token_id")) == (2, None)
    result = compress_cli("check", source, out, "--prompts", "self", "--samples", 1, "--length", 8)
    assert result.exit_code == 0, result.output


# states in number formats

CARRIED = {
    "int8, static": {"format": "int8", "scale": "static"},
    "int8, static, stochastic": {"format": "int8", "scale": "static", "rounding": "stochastic"},
    "int8, dynamic": {"format": "int8"},
    "int4, dynamic, stochastic": {"format": "int4", "rounding": "stochastic"},
    "int4, static": {"format": "int4", "scale": "static"},
    "fp8-e4m3": {"format": "fp8-e4m3"},
    "fp16": {"format": "fp16"},
    "bf16": {"format": "bf16"},
}


@pytest.mark.parametrize("make", [make_jamba, make_nemotron_h])
@pytest.mark.parametrize("name", CARRIED)
def test_genai_carries_states_that_are_alike_in_all_layers(tmp_path, make, name):
    source = make(tmp_path / "source", spread=0.7, eos_token_id=66)
    changed = with_states(source, tmp_path / "changed", dict.fromkeys(ALL, CARRIED[name]))
    out = exporting.export_checkpoint(changed, "onnx", tmp_path / "onnx")
    prompts = np.random.default_rng(1).integers(3, 66, (2, 20))
    ours, theirs = own_greedy(out / "model.onnx", prompts, 8), genai_greedy(genai.Model(str(out)), prompts, 8)
    assert_same_text(theirs, ours, end=66)
    assert len(until(theirs[0], 66)) > 1


DIFFER = {
    "formats of the recurrent state": ({"recurrent_state": {"format": "int8"}}, [0, 3], "recurrent_state"),
    "places of scales": ({"conv_state": {"format": "int8", "scale": "static"}}, [0], "conv_state"),
    "keys and values": ({"key": {"format": "int8"}}, None, "value"),
    "feedback": ({"recurrent_state": {"format": "int8", "rounding": "error_feedback"}}, None, "recurrent_residual"),
    "cadence": ({"recurrent_state": {"format": "int8", "every": 4}}, None, "recurrent_inputs"),
}


@pytest.mark.parametrize("states, layers, named", DIFFER.values(), ids=list(DIFFER))
def test_states_that_differ_between_layers_are_not_told_to_genai_and_we_say_why(tmp_path, states, layers, named):
    changed = with_states(make_jamba(tmp_path / "source"), tmp_path / "changed", states, layers)
    out = exporting.export_checkpoint(changed, "onnx", tmp_path / "onnx")
    described = EXPORTER.describe(out)
    assert not (out / "genai_config.json").exists() and "genai_config.json" not in described.files
    row = next(row for row in EXPORTER.runtimes(Checkpoint(changed).model) if row.name == "onnxruntime-genai")
    assert not row.loads and f"'{named}'" in row.why and row.why in described.notes[0]
    assert len(own_greedy(out / "model.onnx", np.array([[5, 6, 7]]), 3)[0]) == 3


def test_scales_of_other_values_are_alike_to_genai(tmp_path):
    """Layers may round differently as long as type and shape are the same."""
    source = make_jamba(tmp_path / "source")
    one, other = ({"recurrent_state": {"format": "int8", "rounding": r}} for r in ("nearest", "stochastic"))
    first = with_states(source, tmp_path / "first", one, [0, 1])
    config = json.loads((first / "config.json").read_text())
    second = with_states(source, tmp_path / "second", other, [3, 4, 5])
    states = config["compress"]["states"] + json.loads((second / "config.json").read_text())["compress"]["states"]
    (first / "config.json").write_text(json.dumps(config | {"compress": {"states": states}}))
    out = exporting.export_checkpoint(first, "onnx", tmp_path / "onnx")
    assert (out / "genai_config.json").exists() and EXPORTER.describe(out).notes == ()
