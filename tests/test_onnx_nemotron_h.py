"""Nemotron-H's graph, which no file was written for: what our own forward computes, in every form."""

import json

import numpy as np
import onnx
import pytest
import torch
from nemotron_h_models import VARIANTS, make_nemotron_h
from onnx_graphs import EXACT, Steps, all_graphs, assert_shapes_are_inferred, wired
from stepping import own_logits

from compress.apply import exporting
from compress.checkpoint.reader import Checkpoint
from compress.runtime.onnx_session import OnnxSession
from exporters.graph.form import Form

AGREEMENT = 1e-3  # the project's requirement on an exported graph
LENGTH, PROMPT = 75, 70  # a prompt of two chunks


def make_tokens(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Two rows, the second with nine places of padding before it; ids and mask."""
    ids, mask = np.random.default_rng(7).integers(3, vocabulary, (2, LENGTH)), np.ones((2, LENGTH), np.int64)
    mask[1, :9] = 0
    return ids, mask


def expected_logits(model, ids, mask) -> np.ndarray:
    return own_logits(model, torch.from_numpy(ids), [LENGTH], torch.from_numpy(mask)).numpy()


def prompt_and_decode(session: OnnxSession, ids, mask) -> np.ndarray:
    generation = session.start(len(ids))
    pieces = zip(*(np.split(values, range(PROMPT, LENGTH), axis=1) for values in (ids, mask)), strict=True)
    return np.concatenate([generation.step(*piece).copy() for piece in pieces], 1)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
def test_a_prompt_and_decode_give_the_logits_of_our_own_forward(tmp_path, monkeypatch, changes):
    source = make_nemotron_h(tmp_path / "source", **changes)
    path = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx") / "model.onnx"
    ids, mask = make_tokens(67)
    actual, model = prompt_and_decode(OnnxSession(path, EXACT, threads=1), ids, mask), Checkpoint(source).model
    assert np.abs(actual - expected_logits(model, ids, mask))[mask == 1].max() <= AGREEMENT
    graphs = list(all_graphs(onnx.load(path, load_external_data=False).graph))
    assert {node.domain for graph in graphs for node in graph.node} == {""}
    assert_shapes_are_inferred(path, monkeypatch)


def test_the_trained_model_agrees(nemotron, tmp_path):
    path = exporting.export_checkpoint(nemotron, "onnx", tmp_path / "onnx") / "model.onnx"
    model = Checkpoint(nemotron).model
    ids, mask = make_tokens(model.config.vocab_size)
    actual = prompt_and_decode(OnnxSession(path, EXACT, threads=1), ids, mask)
    assert np.abs(actual - expected_logits(model, ids, mask))[mask == 1].max() <= AGREEMENT
    config = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())["model"]["decoder"]
    attention = next(layer.residuals[0].block for layer in model.layers if layer.kind == "attention")
    heads = attention.heads, attention.kv_heads, attention.head_dim
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]) == heads


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Checkpoint(make_nemotron_h(tmp_path_factory.mktemp("model"))).model


FORMS = {
    "one token at a time": Form(decode_only=True),
    "fixed sizes": Form(sizes={"batch_size": 2, "sequence_length": 1, "past_sequence_length": PROMPT}),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_another_form_goes_on_from_the_same_states(model, tmp_path, form):
    ids, mask = make_tokens(67)
    general, other = Steps(wired(model, tmp_path / "general")), Steps(wired(model, tmp_path / "other", form))
    general.step(ids[:, :PROMPT], mask[:, :PROMPT])
    other.states = list(general.states)
    following = ids[:, PROMPT : PROMPT + 1], mask[:, : PROMPT + 1]
    np.testing.assert_allclose(other.step(*following), general.step(*following), rtol=0, atol=1e-5)
    for ours, theirs in zip(other.states, general.states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_stages_give_what_the_whole_gives(model, tmp_path):
    ids, mask = make_tokens(67)
    first, second = (wired(model, tmp_path / str(span.start), Form(span)) for span in (range(0, 3), range(3, 8)))
    whole = Steps(wired(model, tmp_path / "whole")).step(ids, mask)
    chained = Steps(second).step(Steps(first).step(ids, mask), mask)
    np.testing.assert_allclose(chained, whole, rtol=0, atol=1e-5)
