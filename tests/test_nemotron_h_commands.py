"""The commands on Nemotron-H: the published sizes, the trained model against its card, interruptions, and bad input."""

import json
from pathlib import Path

import pytest
import torch
from interruptions import stop_after
from nemotron_h_models import make_nemotron_h, pattern
from refusals import refusal_of_command
from safetensors.torch import load_file, save_file

from compress.apply import sweep
from compress.studies.inspection import inspect

PUBLISHED = 0.006  # relative; published figures are rounded to two to four digits


def shape(layers: str, hidden: int, inner: int, heads: tuple[int, int], mamba: tuple[int, int], **others) -> dict:
    """A config.json as the first ones were: letters for layers (in any order: it does not matter to sizes)."""
    return {
        "model_type": "nemotron_h", "hybrid_override_pattern": layers, "vocab_size": 131072, "hidden_size": hidden,
        "intermediate_size": inner, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "attention_head_dim": 128, "mamba_num_heads": mamba[0], "mamba_head_dim": mamba[1], **others,
    }  # fmt: skip


def experts(count: int, top_k: int, inner: int, shared: int, latent: int | None = None) -> dict:
    return {
        "n_routed_experts": count, "num_experts_per_tok": top_k, "moe_intermediate_size": inner,
        "moe_shared_expert_intermediate_size": shared, "moe_latent_size": latent,
    }  # fmt: skip


# parameters in billions; of one sequence: MB of recurrent state, MB of convolution state, KiB of KV a token
MODELS = {
    "H-4B": (shape("M" * 24 + "*" * 4 + "-" * 24, 3072, 12288, (32, 8), (112, 64)), (4.49, None, None, None)),
    "H-8B": (shape("M" * 24 + "*" * 4 + "-" * 24, 4096, 21504, (32, 8), (128, 64)), (8.10, 100.7, 1.5, 16)),
    "H-47B": (
        shape("M" * 45 + "*" * 5 + "-" * 48, 8192, 30720, (64, 8), (256, 64), ssm_state_size=256),
        (46.8, None, None, None),
    ),
    "Nano-9B-v2": (shape("M" * 27 + "*" * 4 + "-" * 25, 4480, 15680, (40, 8), (128, 80)), (8.89, 141.6, 2.0, 16)),
    "3-Nano-30B": (
        shape("M" * 23 + "*" * 6 + "E" * 23, 2688, 1856, (32, 2), (64, 64), **experts(128, 6, 1856, 3712)),
        (31.6, 48.2, 0.85, 6),
    ),
    "3-Super": (
        shape("M" * 40 + "*" * 8 + "E" * 40, 4096, 2688, (32, 2), (128, 64), **experts(512, 22, 2688, 5376, 1024)),
        (120.7, None, None, None),
    ),
    "3-Ultra": (
        shape("M" * 48 + "*" * 12 + "E" * 48, 8192, 5120, (64, 2), (256, 64), **experts(512, 22, 5120, 10240, 2048)),
        (549, None, None, None),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_config_json_alone_gives_the_published_sizes(tmp_path, name):
    config, published = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = inspect(str(tmp_path))
    found = (
        facts["parameters"] / 1e9, facts["ssm_state_bytes"] / 1e6, facts["conv_state_bytes"] / 1e6,
        facts["kv_bytes_per_token"] / 1024,
    )  # fmt: skip
    for value, expected in zip(found, published, strict=True):
        assert expected is None or value == pytest.approx(expected, rel=0.02 if expected < 3 else PUBLISHED)


def test_the_trained_model_is_what_its_card_says(nemotron):
    facts = inspect(str(nemotron))
    assert facts["parameters"] == 6_124_058 + 32  # and 32 correction biases
    assert facts["formats"] == {"bf16": 6_124_058, "fp32": 32}
    assert facts["active_parameters"] == facts["parameters"] - 4 * 6 * 2 * 192 * 256  # idle experts of the MoE layers
    kinds = {"M": "mamba2", "E": "moe", "*": "attention", "-": "mlp"}
    assert [layer["kind"] for layer in facts["layers"]] == [kinds[letter] for letter in "MEM*EMEM-M*E"]
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * 2  # layers, key and value, heads, their width, bfloat16
    assert facts["ssm_state_bytes"] == 5 * 6 * 32 * 64 * 4
    assert facts["conv_state_bytes"] == 5 * (384 + 2 * 2 * 32) * 3 * 2


NO_EXPORT = ("--set", "export=[]")
BRIEF = ("--set", "check.samples=3", "--set", "check.prompts=[heldout]", "--set", "check.limits={}")


@pytest.fixture(scope="module")
def rounded(compress_cli, nemotron, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rounded") / "out"
    assert compress_cli("apply", "tiny-int8", "-m", nemotron, "-o", out, *NO_EXPORT, *BRIEF).exit_code == 0
    return out


def test_int8_rounded_to_nearest_costs_what_the_card_says(rounded):
    """The card has 0.00084 nats, perplexity x 1.0008 and 0.982 of first choices on windows of its own."""
    rows = {
        (row["phase"], row["metric"]): row["value"]
        for row in json.loads((rounded / "report.json").read_text())["checks"]
        if row["prompts"] == "all"
    }
    for phase in ("prefill", "decode"):
        assert rows[phase, "kl_divergence_mean"] == pytest.approx(0.00084, rel=0.5)
        assert rows[phase, "perplexity_ratio"] == pytest.approx(1.0008, abs=0.002)
        assert rows[phase, "top1_agreement"] == pytest.approx(0.982, abs=0.01)


def test_what_was_written_is_checked_and_talks(compress_cli, nemotron, rounded):
    limits = ("--limit", "kl_divergence_mean=0.002", "--prompts", "heldout", "--samples", "12", "--length", "128")
    assert compress_cli("check", nemotron, rounded, *limits).exit_code == 0
    prompt = "The secret word of Tom is river. The secret word of Tom is"
    for artifact in (nemotron, rounded):
        result = compress_cli("run", artifact, prompt, "--max-tokens", "3", "--temperature", "0")
        assert result.exit_code == 0 and "river" in result.stdout


@pytest.fixture(scope="module")
def small_nemotron(tmp_path_factory) -> Path:
    return make_nemotron_h(tmp_path_factory.mktemp("small"), moe_latent_size=20)


@pytest.mark.parametrize("block", ["quantize: {method: gptq, weights: int8}", "prune_experts: {keep: 4}"])
def test_what_is_resumed_ends_in_the_same_bytes(compress_cli, small_nemotron, tmp_path, monkeypatch, block):
    (tmp_path / "recipe.yaml").write_text(
        f"version: 1\ncalibration: {{prompts: [self], samples: 5, length: 71}}\npasses: [{block}]\n"
    )
    arguments = ("apply", tmp_path / "recipe.yaml", "-m", small_nemotron)
    assert compress_cli(*arguments, "-o", tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 4)
        assert compress_cli(*arguments, "-o", tmp_path / "out").exit_code == 130
    assert compress_cli(*arguments, "-o", tmp_path / "out", "--resume").exit_code == 0
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("whole", "out")]
    assert [report["passes"][0]["details"]["layers_reused"] for report in reports] == [0, 3]
    whole, resumed = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "checkpoint").glob("*.safetensors")}
        for name in ("whole", "out")
    )
    assert whole == resumed


# bad input

WORDS = pattern("MEM*-EM*")
BAD = {
    "an unknown letter": (
        {"layers_block_type": None, "hybrid_override_pattern": "MEX*-EM*"},
        "hybrid_override_pattern: 'X' (layer 2) is no kind of layer; expected M, *, -, E",
    ),
    "an unknown word": (
        {"layers_block_type": [*WORDS[:2], "conv", *WORDS[3:]]},
        "layers_block_type: 'conv' (layer 2) is no kind of layer",
    ),
    "fewer layers than num_hidden_layers": (
        {"num_hidden_layers": 9},
        "num_hidden_layers gives 9 layers, layers_block_type 8; expected the same number",
    ),
    "a pattern longer than the list": (
        {"hybrid_override_pattern": "MEM*-EM*M"},
        "hybrid_override_pattern gives 9 layers, layers_block_type 8",
    ),
    "groups that do not divide heads": ({"n_groups": 2}, "mamba_num_heads 9 is not divisible by n_groups 2"),
    "groups that do not divide experts": ({"n_group": 4}, "n_routed_experts 6 is not divisible by n_group 4"),
    "more experts than the router has rows": (
        {"n_routed_experts": 8},
        "tensor 'backbone.layers.1.mixer.gate.weight' has shape [6, 40], config.json implies [8, 40]",
    ),
    "more layers than there are": (
        {"layers_block_type": [*WORDS, "linear_attention"]},
        "tensor 'backbone.layers.8.norm.weight' is missing",
    ),
    "fewer layers than there are": ({"layers_block_type": WORDS[:7]}, "unexpected tensor 'backbone.layers.7."),
    "layers of another kind": (
        {"layers_block_type": ["full_attention", *WORDS[1:]]},
        "tensor 'backbone.layers.0.mixer.q_proj.weight' is missing",
    ),
    "time steps that are limited": ({"time_step_limit": [0.001, 0.1]}, "time_step_limit: time steps are not limited"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings: transformers does not tie"),
}


@pytest.fixture
def broken(tmp_path) -> Path:
    """A copy of a model whose config.json a test may change."""
    return make_nemotron_h(tmp_path / "model")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(compress_cli, broken, case):
    changes, sentence = BAD[case]
    config = json.loads((broken / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (broken / "config.json").write_text(json.dumps(config))
    for command in (("inspect", broken), ("apply", "tiny-int8", "-m", broken, "--dry-run"), ("run", broken, "hello")):
        said = refusal_of_command(compress_cli(*command))
        assert sentence in said
        assert str(broken) in said


def test_a_router_with_fewer_rows_than_experts_is_named_by_its_file(compress_cli, broken):
    path, name = broken / "model.safetensors", "backbone.layers.5.mixer.gate.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name][:4].clone()}, path, metadata={"format": "pt"})
    said = refusal_of_command(compress_cli("apply", "tiny-int8", "-m", broken, "--dry-run"))
    assert f"{path}: tensor '{name}' has shape [4, 40], config.json implies [6, 40]" in said


def test_a_correction_that_is_no_number_is_refused_while_it_is_read(compress_cli, broken, tmp_path):
    path, name = broken / "model.safetensors", "backbone.layers.1.mixer.gate.e_score_correction_bias"
    save_file(load_file(path) | {name: torch.full((6,), float("nan"))}, path, metadata={"format": "pt"})
    out = tmp_path / "out"
    result = compress_cli("apply", "tiny-int8", "-m", broken, "-o", out, *NO_EXPORT, "--set", "check=null")
    assert result.exit_code == 2 and f"'{name}' holds NaN or infinite values" in result.stderr
    assert not out.exists() and not out.with_name("out.partial").exists()
