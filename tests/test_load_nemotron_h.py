"""Compressed Nemotron-Hs under stock transformers: it gives every weight as our reader does where a Jamba's checkpoint would
load, and stops at the others. What `compress.load` gives is in test_nemotron_h_forward.py."""

import json
from pathlib import Path

import pytest
import torch
from nemotron_h_models import make_nemotron_h
from test_load import EQUAL, KEPT_DT, REFUSED, ROUNDED, as_rounded, case, stock_weights
from test_nemotron_h_forward import as_model, stacked

from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime import runtimes

# Groups of 32 divide every K; the experts work in a latent space, and every linear that may have a bias has one
SHAPE = {
    "layers_block_type": "MEM*-E", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
    "moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 32, "moe_latent_size": 32, "mlp_bias": True,
    "use_bias": True, "spread": 0.7,
}  # fmt: skip
CASES = {
    "int8": case(EQUAL, "int8"),
    "int4-g32": case(ROUNDED, "int4-g32", roles=KEPT_DT),
    "fp8 static": case(EQUAL, "fp8-e4m3", activations="static-fp8"),
    "experts int4-g32, int8": case(ROUNDED, "int8", roles={"experts": "int4-g32"}),
    "shared experts none, int8": case(EQUAL, "int8", roles={"shared_experts": "none"}),
    "shared experts int8-g32, int4-g32": case(REFUSED, "int4-g32", roles={"shared_experts": "int8-g32"}),
    "int8 dynamic": case(REFUSED, "int8", activations="dynamic-int8"),
    "experts none, int8": case(REFUSED, "int8", roles={"experts": "none"}),
    "experts none, fp8": case(EQUAL, "fp8-e4m3", roles={"experts": "none"}),
    "rotated fp8": case(REFUSED, "fp8-e4m3", activation_roles={"ssm_out": "static-fp8"}, rotate=["ssm_out"]),
}
PRUNED = {"a budget": ({"budget": 0.4}, REFUSED), "the same number": ({"keep": 4}, EQUAL)}


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    """The checkpoint of passes on one random model."""
    root = tmp_path_factory.mktemp("nemotron_h")
    source = make_nemotron_h(root / "source", **SHAPE)
    few = ("check=null", "export=[]", "calibration={prompts: [self], samples: 4, length: 32}")

    def apply(name: str, step: dict) -> Path:
        recipe = load_recipe("tiny-int8", (*few, f"passes={json.dumps([step])}"))
        pipeline.apply(pipeline.Job(recipe, resolve(str(source)), root / name))
        return root / name / "checkpoint"

    return apply


def assert_loads_or_stops(folder: Path, stock: str):
    if stock == REFUSED:
        with pytest.raises((RuntimeError, AttributeError, ValueError)):
            stock_weights(folder, torch.float32)
        return
    ours = {weight.name: weight.dense() for weight in Checkpoint(folder, allow_quantized=True).model.weights}
    expected = {n: t for n, t in as_model(stacked(ours)).items() if not n.endswith("e_score_correction_bias")}
    loaded = stock_weights(folder, torch.float32)
    assert loaded.keys() == expected.keys()
    others = [key for key, tensor in loaded.items() if not torch.equal(tensor, expected[key])]
    assert bool(others) == (stock == ROUNDED)
    assert all(as_rounded(loaded[key], expected[key]) for key in others)


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_loads_it_or_stops_as_we_say(applied, name):
    folder = applied(name, {"quantize": CASES[name].options})
    row = runtimes.of_checkpoint(Checkpoint(folder, allow_quantized=True).model)[0]
    assert (row.name, row.loads) == ("transformers", CASES[name].stock != REFUSED)
    assert_loads_or_stops(folder, CASES[name].stock)


@pytest.mark.parametrize("name", PRUNED)
def test_stock_transformers_loads_a_pruned_one_or_stops_as_we_say(applied, name):
    options, stock = PRUNED[name]
    folder = applied(name, {"prune_experts": options})
    assert runtimes.of_checkpoint(Checkpoint(folder).model)[0].loads == (stock != REFUSED)
    assert_loads_or_stops(folder, stock)
