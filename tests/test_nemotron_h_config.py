"""config.json of a Nemotron-H: every dialect as transformers reads it, and what is refused."""

import json
import math
from pathlib import Path

import pytest
from nemotron_h_models import VARIANTS, configuration, pattern
from refusals import refusal
from transformers import NemotronHConfig

from compress.model.families.nemotron_h import LETTERS, WORDS, NemotronH

BASE = {
    "model_type": "nemotron_h",
    "hidden_size": 48,
    "mamba_num_heads": 12,
    "n_groups": 4,
    "n_routed_experts": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
INFINITY = {"__float__": "Infinity"}

DIALECTS = {
    "nothing but defaults": {},
    "new words": {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "moe"]},
    "old words": {"layers_block_type": ["mamba", "mlp", "attention", "moe"]},
    "old and new words": {"layers_block_type": ["mamba", "linear_attention", "full_attention", "attention"]},
    "letters": {"hybrid_override_pattern": "M-M*EE"},
    "letters and how many": {"hybrid_override_pattern": "M-M*EE", "num_hidden_layers": 6},
    "letters beside a list of null": {"hybrid_override_pattern": "M*", "layers_block_type": None},
    "a list beats letters": {"hybrid_override_pattern": "MMM", "layers_block_type": ["mlp", "moe", "mamba"]},
    "a list beside letters of null": {"hybrid_override_pattern": None, "layers_block_type": ["mlp", "moe", "mamba"]},
    "layer_types": {"layer_types": ["mamba", "attention"]},
    "layer_types beats the list": {"layer_types": ["mamba", "moe"], "layers_block_type": ["mlp", "attention"]},
    "as many layers as the default": {"num_hidden_layers": 4},
    "how many is null": {"num_hidden_layers": None, "hybrid_override_pattern": "MME"},
    "names of other Mambas": {"mamba_n_groups": 3, "mamba_d_conv": 3, "mamba_conv_bias": False, "mamba_expand": 7},
    "both names, of which these count": {"mamba_n_groups": 6, "n_groups": 5, "mamba_d_conv": 2, "conv_kernel": 9},
    "num_local_experts": {"num_local_experts": 6},
    "num_local_experts beats n_routed_experts": {"num_local_experts": 6, "n_routed_experts": 7},
    "num_experts is no name here": {"num_experts": 5},
    "keys of how dt_bias was drawn": {"mamba_dt_min": 0.1, "time_step_max": 3.0, "mamba_dt_init_floor": 0.5},
    "limits of time steps": {"time_step_limit": [0.0, math.inf]},
    "limits as 5.23 writes them": {"time_step_limit": [0.0, INFINITY]},
    "limits by another name": {"mamba_dt_limit": [0.0, INFINITY]},
    "latent projections": {"moe_latent_size": 24},
    "no latent projections": {"moe_latent_size": None},
    "biases": {"use_bias": True, "mlp_bias": True},
    "biases that nothing has": {"attention_bias": True, "mamba_proj_bias": True},
    "routing": {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 5, "norm_topk_prob": False},
    "a scale that is whole": {"routed_scaling_factor": 2},
    "norms": {"layer_norm_epsilon": 1e-6, "norm_eps": 1e-2, "rms_norm_eps": 1e-3},
    "positions that nothing uses": {"rope_theta": 10000, "partial_rotary_factor": 0.5, "sliding_window": None},
    "prediction of several tokens": {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"},
    "several ends": {"eos_token_id": [2, 11], "bos_token_id": None, "pad_token_id": None},
    "residual stream in float32": {"residual_in_fp32": True, "n_shared_experts": 2, "chunk_size": 17},
    "dense, with keys of experts": {"hybrid_override_pattern": "M-*", "n_routed_experts": 3, "num_experts_per_tok": 9},
    "no Mamba, heads that do not divide": {"hybrid_override_pattern": "*-E", "mamba_num_heads": 7},
    "no attention, heads that do not divide": {"hybrid_override_pattern": "M-E", "num_key_value_heads": 5},
}
SAME = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "mlp_hidden_act", "mlp_bias", "mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
    *("n_groups", "conv_kernel", "use_conv_bias", "mamba_hidden_act", "use_bias", "n_routed_experts", "n_group"),
    *("num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size", "moe_latent_size"),
    *("topk_group", "norm_topk_prob", "routed_scaling_factor", "num_nextn_predict_layers"),
    *("sliding_window", "tie_word_embeddings", "max_position_embeddings", "bos_token_id", "eos_token_id"),
    "pad_token_id",
)


def assert_reads_as_transformers_does(values: dict, folder: Path):
    (folder / "config.json").write_text(json.dumps(values))
    expected, actual = NemotronHConfig.from_pretrained(folder), NemotronH.CONFIG.parse(values, "config.json")
    assert {key: getattr(actual, key) for key in SAME} == {key: getattr(expected, key) for key in SAME}
    assert actual.rms_norm_eps == expected.layer_norm_epsilon
    assert actual.kinds == tuple(WORDS[word] for word in expected.layers_block_type)
    assert actual.time_step_limit == tuple(expected.time_step_limit)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_means_what_it_means_to_transformers(dialect, tmp_path):
    assert_reads_as_transformers_does({**BASE, **DIALECTS[dialect]}, tmp_path)


def test_defaults_are_those_of_transformers(tmp_path):
    assert_reads_as_transformers_does({"model_type": "nemotron_h"}, tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_saves_is_read(variant, tmp_path):
    saved = configuration(**VARIANTS[variant])
    saved.save_pretrained(tmp_path)
    assert_reads_as_transformers_does(json.loads((tmp_path / "config.json").read_text()), tmp_path)


def test_the_trained_model_is_read(nemotron):
    values = json.loads((nemotron / "config.json").read_text())
    config = NemotronH.CONFIG.parse(values, "config.json")
    assert config.kinds == tuple(LETTERS[letter] for letter in "MEM*EMEM-M*E")
    assert (config.total_experts, config.rms_norm_eps) == (8, 1e-5)


def shapes(**changes) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a layer that routes, by what they are called in it."""
    layer = NemotronH.parse({**BASE, **changes}, "config.json").layer(1)
    return {spec.name.removeprefix("backbone.layers.1.mixer."): spec.shape for spec in layer.specs()}


def test_a_shared_expert_of_width_0_is_as_wide_as_an_mlp():
    assert shapes(moe_shared_expert_intermediate_size=0, intermediate_size=33)["shared_experts.up_proj.weight"][0] == 33


def test_latent_projections_narrow_the_routed_experts_alone():
    found = shapes(moe_latent_size=20, moe_intermediate_size=9)
    assert found["experts.11.up_proj.weight"] == (9, 20)
    assert (found["fc1_latent_proj.weight"], found["fc2_latent_proj.weight"]) == ((20, 48), (48, 20))
    assert {found[name][1] for name in ("gate.weight", "shared_experts.up_proj.weight")} == {48}


def test_a_head_size_by_the_name_of_older_code_is_read_and_loses_to_the_newer():
    assert NemotronH.CONFIG.parse({**BASE, "attention_head_dim": 64}, "config.json").head_dim == 64
    assert NemotronH.CONFIG.parse({**BASE, "attention_head_dim": 64, "head_dim": 16}, "config.json").head_dim == 16


def test_no_number_of_key_value_heads_is_one_per_query_head():
    assert NemotronH.CONFIG.parse({**BASE, "num_key_value_heads": None}, "config.json").num_key_value_heads == 6


BAD = {
    "an unknown letter": ({"hybrid_override_pattern": "MEX*"}, "hybrid_override_pattern", "'X' (layer 2)"),
    "a small letter": ({"hybrid_override_pattern": "Me"}, "hybrid_override_pattern", "'e' (layer 1)"),
    "an unknown letter beside a list": (
        {"hybrid_override_pattern": "MX", "layers_block_type": ["mamba", "mlp"]},
        "hybrid_override_pattern",
        "'X'",
    ),
    "an unknown word": ({"layers_block_type": ["mamba", "conv"]}, "layers_block_type", "'conv' (layer 1)"),
    "a word for the list": ({"layers_block_type": "MEM"}, "layers_block_type", "list"),
    "a list for letters": ({"hybrid_override_pattern": ["M"]}, "hybrid_override_pattern", "string"),
    "no layers": ({"hybrid_override_pattern": ""}, "hybrid_override_pattern", "0 layers"),
    "an empty list": ({"layers_block_type": []}, "layers_block_type", "0 layers"),
    "more layers than letters": (
        {"hybrid_override_pattern": "ME*", "num_hidden_layers": 4},
        "num_hidden_layers gives 4",
        "hybrid_override_pattern 3",
    ),
    "fewer layers than words": (
        {"layers_block_type": ["mamba", "mlp"], "num_hidden_layers": 1},
        "num_hidden_layers gives 1",
        "layers_block_type 2",
    ),
    "more letters than words": (
        {"layers_block_type": ["mamba", "mlp"], "hybrid_override_pattern": "M-M"},
        "hybrid_override_pattern gives 3",
        "layers_block_type 2",
    ),
    "layers without a list": ({"num_hidden_layers": 52}, "num_hidden_layers gives 52", "layers_block_type"),
    "more layers than any model": ({"hybrid_override_pattern": "M" * 10_001}, "10001 layers", "10000"),
    "groups that do not divide the heads": ({"n_groups": 5}, "mamba_num_heads 12", "n_groups 5"),
    "groups by another name": ({"mamba_n_groups": 5}, "mamba_num_heads 12", "n_groups 5"),
    "heads that do not divide": ({"num_key_value_heads": 4}, "num_attention_heads 6", "num_key_value_heads 4"),
    "groups that do not divide the experts": ({"n_group": 5}, "n_routed_experts 12", "n_group 5"),
    "groups of one expert": ({"n_group": 12}, "n_routed_experts 12", "fewer than 2"),
    "one expert": ({"n_routed_experts": 1, "num_experts_per_tok": 1}, "n_routed_experts 1", "fewer than 2"),
    "more groups used than there are": ({"n_group": 2, "topk_group": 3}, "topk_group 3", "n_group 2"),
    "more experts a token than there are": ({"num_experts_per_tok": 13}, "num_experts_per_tok 13", "12"),
    "more experts a token than the groups hold": (
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 4},
        "num_experts_per_tok 4",
        "topk_group 1",
    ),
    "no experts a token": ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0", "1 or more"),
    "no heads": ({"mamba_num_heads": 0}, "mamba_num_heads is 0", "1 or more"),
    "a count below none": ({"mamba_num_heads": -1}, "mamba_num_heads", "0"),
    "a convolution of one token": ({"mamba_d_conv": 1}, "mamba_d_conv", "2"),
    "another activation": ({"mlp_hidden_act": "silu"}, "mlp_hidden_act", "relu2"),
    "another activation of Mamba": ({"mamba_hidden_act": "gelu"}, "mamba_hidden_act", "silu"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings", "expected false"),
    "a sliding window": ({"sliding_window": 128}, "sliding_window", "expected null"),
    "limited time steps": ({"time_step_limit": [0.0, 0.1]}, "time_step_limit", "[0.0, Infinity]"),
    "time steps with a floor": ({"mamba_dt_limit": [0.001, math.inf]}, "mamba_dt_limit", "[0.0, Infinity]"),
    "limits that are no numbers": ({"time_step_limit": [0.0, "Infinity"]}, "time_step_limit", "[0.0, Infinity]"),
    "one limit": ({"time_step_limit": [0.0]}, "time_step_limit", "[0.0, Infinity]"),
    "null for a size": ({"hidden_size": None}, "hidden_size", "integer"),
    "text for a size": ({"mamba_n_groups": "4"}, "mamba_n_groups", "integer"),
    "a scale of nothing": ({"routed_scaling_factor": 0.0}, "routed_scaling_factor", "0"),
    "no epsilon": ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon", "0"),
    "more experts than any model": (
        {"hybrid_override_pattern": "E" * 100, "n_routed_experts": 9000},
        "100 layers",
        "9000 experts",
    ),
    "fewer router rows than experts": ({"compress": {"router_rows": 11}}, "router_rows is 11", "12"),
    "kept router rows": ({"compress": {"router_rows": 13}}, "router_rows", "softmax"),
    "counts of other layers": ({"compress": {"num_experts_per_layer": [1, 9]}}, "num_experts_per_layer", "4"),
    "a count that groups do not divide": (
        {"n_group": 2, "compress": {"num_experts_per_layer": [1, 9, 1, 1]}},
        "num_experts_per_layer[1] 9",
        "n_group 2",
    ),
    "a typing error in our section": ({"compress": {"router_row": 3}}, "compress.router_row", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_model_is_refused_in_one_sentence(case):
    changes, *parts = BAD[case]
    message = refusal(lambda: NemotronH.CONFIG.parse({**BASE, **changes}, "folder/config.json"))
    assert message.startswith("folder/config.json: ")
    assert len(message) < 400
    for part in parts:
        assert part in message


def test_layers_that_differ_in_their_experts_are_read():
    section = {"num_experts_per_layer": [1, 9, 1, 1]}
    config = NemotronH.CONFIG.parse({**BASE, "compress": section, "layers_block_type": pattern("MEM*")}, "config.json")
    assert config.experts_of(1) == 9
