"""Pruning beside quantization in one recipe: what each is made for, and what the report counts."""

import pytest
import torch
from jamba_models import fused, load_reference
from pruning_oracle import MOE_LAYERS, WINDOWS, apply, assert_same_tensors, make_source
from transformers import JambaConfig, JambaForCausalLM

from compress.calibration.inputs import LayerInputs
from compress.checkpoint.reader import Checkpoint

KEEP = 3
QUANTIZE = {"quantize": {"method": "gptq", "weights": "int8", "min_tokens": 1}}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


def test_pruning_and_quantizing_in_one_recipe_is_one_after_the_other_where_no_other_error_comes_between(tmp_path):
    """Only layer 0 has experts, and the embedding stays: what reaches them is the same in the recipe of both and in that of
    pruning alone. Elsewhere experts are chosen and corrected for what quantized layers hand on, and the bytes differ."""
    quantize = {"quantize": QUANTIZE["quantize"] | {"roles": {"embedding": "none"}}}
    source = make_source(tmp_path / "source", num_hidden_layers=3, expert_layer_offset=0)
    pruned = apply(source, tmp_path / "pruned", {"keep": KEEP})
    after = apply(pruned.checkpoint, tmp_path / "after", quantize)
    both = apply(source, tmp_path / "both", {"keep": KEEP}, quantize)
    assert pruned.layers[0]["recovered"]
    assert_same_tensors(both.stored, after.stored)
    assert both.config["num_experts"] == KEEP
    assert both.report["passes"][1]["details"]["experts"] == after.details["experts"]


def test_a_later_layer_is_pruned_for_the_states_that_pruned_and_quantized_layers_hand_on(source, tmp_path, monkeypatch):
    entering = {}

    class Noting(LayerInputs):
        def __init__(self, model, index, states, *rest):
            super().__init__(model, index, states, *rest)
            entering[index] = torch.cat([states.read(number) for number in range(len(states))]).flatten(0, 1)

    monkeypatch.setattr("compress.apply.sweep.LayerInputs", Noting)
    run = apply(source, tmp_path, {"keep": KEEP}, QUANTIZE)
    weights = {w.name: w.dense() for w in Checkpoint(run.checkpoint, allow_quantized=True).model.weights}
    config = {key: value for key, value in run.config.items() if key != "quantization_config"}
    model = JambaForCausalLM(JambaConfig(**config | {"dtype": "float32"})).eval()
    model.load_state_dict(fused(weights, KEEP))
    found, original = {}, {}
    for reference, seen in ((model, found), (load_reference(source), original)):
        for index, layer in enumerate(reference.model.layers):
            layer.register_forward_pre_hook(
                lambda _, arguments, i=index, seen=seen: seen.setdefault(i, []).append(arguments[0].flatten(0, 1))
            )
        with torch.no_grad():
            for window in WINDOWS:
                reference(window[None], use_cache=False)
    for index in (2, 4):
        expected, other = torch.cat(found[index]), torch.cat(original[index])
        assert (entering[index] - expected).norm() < 1e-3 * expected.norm()  # float32 through several layers
        assert (other - expected).norm() > 2e-2 * expected.norm()


def test_coverage_is_that_of_the_last_pass_that_counted(source, tmp_path):
    both = apply(source, tmp_path / "both", {"keep": KEEP}, QUANTIZE)
    counted = both.report["passes"][1]["details"]["experts"]
    assert {(entry["layer"], entry["expert"]) for entry in counted} == {(i, e) for i in MOE_LAYERS for e in range(KEEP)}
    least = min(entry["tokens"] for entry in counted)
    assert both.report["calibration"]["expert_coverage"]["min_tokens"] == least
    assert least > min(entry["tokens"] for entry in both.details["experts"])  # tokens of removed experts go elsewhere
    rounded = apply(source, tmp_path / "rtn", {"keep": KEEP}, {"quantize": {"weights": "int8"}})
    least = min(entry["tokens"] for entry in rounded.details["experts"])
    assert rounded.report["calibration"]["expert_coverage"]["min_tokens"] == least
    assert {w.format for w in Checkpoint(rounded.checkpoint, allow_quantized=True).model.weights} > {"int8"}


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_an_earlier_pass_quantized_besides_the_experts_stays(source, tmp_path, method):
    first = {"quantize": {"method": method, "weights": "int8", "roles": {"experts": "none"}}}
    run = apply(source, tmp_path, first, {"keep": KEEP})
    formats = {weight.name: weight.format for weight in Checkpoint(run.checkpoint, allow_quantized=True).model.weights}
    assert {used for name, used in formats.items() if ".experts." in name} == {"bf16"}
    assert formats["lm_head.weight"] == formats["model.layers.1.mamba.in_proj.weight"] == "int8"
    assert run.report["passes"][1]["details"]["experts_after"] == 2 * KEEP
