"""`compress inspect`: the arithmetic of sizes, from config.json alone, from a checkpoint and from an ONNX artifact."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from jamba_models import make_jamba
from safetensors import safe_open
from transformers import JambaConfig, JambaForCausalLM

from compress.apply import exporting
from compress.errors import InputError
from compress.studies.inspection import as_text, inspect

PUBLISHED = 0.005  # relative; published figures are rounded to three or four digits

COMMON = {"model_type": "jamba", "vocab_size": 65536, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
MIXTURE = {
    **COMMON,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "num_key_value_heads": 8,
}
MINI = {  # AI21-Jamba-1.5-Mini
    **MIXTURE,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "mamba_dt_rank": 256,
}
LARGE = {  # AI21-Jamba-1.5-Large
    **MIXTURE,
    "hidden_size": 8192,
    "intermediate_size": 24576,
    "num_hidden_layers": 72,
    "num_attention_heads": 64,
    "mamba_dt_rank": 512,
}
REASONING = {  # AI21-Jamba-Reasoning-3B; only with tied embeddings has it the published 3.03 billion
    **COMMON,
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 1,
    "attn_layer_period": 14,
    "attn_layer_offset": 7,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "mamba_dt_rank": 160,
    "tie_word_embeddings": True,
}

NEMOTRON_H_8B = {  # Nemotron-H-8B-Base-8K (arXiv 2504.03624)
    "model_type": "nemotron_h",
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 21504,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def inspect_config(folder: Path, config: dict) -> dict:
    """From a folder with nothing but this config.json."""
    (folder / "config.json").write_text(json.dumps(config))
    return inspect(str(folder))


def roughly(value: float):
    return pytest.approx(value, rel=PUBLISHED)


# the reference model, by hand


STATES_BY_HAND = {
    "kv_bytes_per_token": 256,  # 2 attention layers, key and value, 1 head of 32, bfloat16: 2 * 2 * 1 * 32 * 2
    "ssm_state_bytes": 122_880,  # 6 Mamba layers, 16 states of 320 channels, float32: 6 * 16 * 320 * 4
    "conv_state_bytes": 11_520,  # 6 Mamba layers, 3 inputs of 320 channels, bfloat16: 6 * 320 * 3 * 2
}


def assert_is_the_reference_model(facts: dict):
    assert facts["model_type"] == "jamba"
    assert facts["parameters"] == 7_381_532
    assert facts["active_parameters"] == 7_381_532 - 4 * 6 * 3 * 160 * 320  # MoE layers, idle experts, their matrices
    assert facts["experts"] == {"total": 8, "active": 2}
    assert [layer["index"] for layer in facts["layers"]] == list(range(8))
    assert [layer["kind"] for layer in facts["layers"]] == [*["mamba", "mamba", "attention", "mamba"] * 2]
    assert [layer["experts"] for layer in facts["layers"]] == [1, 8] * 4


def test_the_reference_checkpoint(tiny):
    facts = inspect(str(tiny))
    assert_is_the_reference_model(facts)
    assert facts.items() >= STATES_BY_HAND.items()
    assert facts["weight_bytes"] == 2 * 7_381_532
    assert facts["formats"] == {"bf16": 7_381_532}


def test_config_json_alone_is_enough(tiny, tmp_path):
    facts = inspect_config(tmp_path, json.loads((tiny / "config.json").read_text()))
    assert_is_the_reference_model(facts)
    assert facts.items() >= STATES_BY_HAND.items()
    assert facts["weight_bytes"] == 2 * 7_381_532


def role_by_name(name: str) -> str:
    """The roles of the project's design, from transformers' names."""
    endings = {
        "embed_tokens.weight": "embedding",
        "lm_head.weight": "lm_head",
        "router.weight": "router",
        "in_proj.weight": "ssm_in",
        "x_proj.weight": "ssm_x_proj",
        "dt_proj.weight": "ssm_dt_proj",
        "dt_proj.bias": "ssm_dt_bias",
        "out_proj.weight": "ssm_out",
        "conv1d.weight": "ssm_conv",
        "conv1d.bias": "ssm_conv",
        "A_log": "ssm_a",
        ".D": "ssm_d",
        "self_attn.o_proj.weight": "attention_out",
    }
    found = next((role for end, role in endings.items() if name.endswith(end)), None)
    if found is None and "self_attn" in name:
        return "attention_qkv"
    if found is None and "feed_forward" in name:
        return "experts" if ".experts." in name else "mlp"
    return found or "norm"


def test_parameters_by_role_are_those_of_the_tensors(tiny):
    expected: dict[str, int] = {}
    with safe_open(tiny / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            role = role_by_name(name)
            expected[role] = expected.get(role, 0) + file.get_tensor(name).numel()
    assert inspect(str(tiny))["roles"] == expected


def test_a_shipped_model_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_is_the_reference_model(inspect("models/tiny-jamba"))


# published models, from config.json alone


def test_jamba_mini_has_its_published_sizes(tmp_path):
    facts = inspect_config(tmp_path, MINI)
    assert facts["parameters"] == roughly(51.57e9)
    assert facts["active_parameters"] == roughly(12.11e9)
    assert facts["kv_bytes_per_token"] == 16 * 1024
    assert facts["ssm_state_bytes"] == roughly(14.7e6)
    assert facts["conv_state_bytes"] == 28 * 8192 * 3 * 2  # 1.4 MB
    assert facts["weight_bytes"] == 2 * facts["parameters"]  # bfloat16 where config.json names no type
    assert facts["experts"] == {"total": 16, "active": 2}


def test_jamba_mini_remembers_what_is_published(tmp_path):
    """arXiv 2403.19887: 4 GB of KV at 256K tokens in 16 bits."""
    memory = inspect_config(tmp_path, MINI)["state_memory"]
    assert memory["kv_cache"]["at"]["262144"] == 4_294_967_296
    assert memory["ssm_state"]["bytes_per_sequence"] == memory["ssm_state"]["at"]["4096"] == 14_680_064
    assert memory["kv_cache"]["bytes_per_token"] == 16 * 1024
    assert memory["total"]["at"]["32768"] == 14_680_064 + 28 * 8192 * 3 * 2 + 32768 * 16 * 1024


def test_nemotron_h_8b_remembers_what_is_published(tmp_path):
    """24 layers of Mamba-2 with 128 heads of 64, d_state 128, in float32: 100.7 MB."""
    memory = inspect_config(tmp_path, NEMOTRON_H_8B)["state_memory"]
    assert memory["ssm_state"]["bytes_per_sequence"] == 24 * 128 * 64 * 128 * 4 == 100_663_296
    assert memory["kv_cache"]["bytes_per_token"] == 4 * 2 * 8 * 128 * 2


def test_the_text_tells_what_is_remembered_at_three_contexts(compress_cli, tiny):
    lines = compress_cli("inspect", tiny).stdout.splitlines()
    told = [line.split() for line in lines if line.startswith("remembered at")]
    assert [(words[2], words[3]) for words in told] == [
        ("4K", "1,182,976"), ("32K", "8,523,008"), ("256K", "67,243,264")
    ]  # fmt: skip


def test_jamba_large_has_its_published_sizes(tmp_path):
    facts = inspect_config(tmp_path, LARGE)
    assert facts["parameters"] == roughly(398.55e9)
    assert facts["active_parameters"] == roughly(94.14e9)
    assert facts["kv_bytes_per_token"] == 9 * 2 * 8 * 128 * 2
    assert facts["ssm_state_bytes"] == 63 * 16 * 16384 * 4


def test_jamba_reasoning_has_its_published_size(tmp_path):
    facts = inspect_config(tmp_path, REASONING)
    assert facts["parameters"] == facts["active_parameters"] == roughly(3.03e9)
    assert facts["experts"] == {"total": 1, "active": 1}
    assert facts["kv_bytes_per_token"] == 2 * 2 * 1 * 128 * 2
    assert facts["ssm_state_bytes"] == 26 * 16 * 5120 * 4
    assert "lm_head" not in facts["roles"]


@pytest.mark.parametrize(
    "config", [MINI, LARGE, REASONING, {**MINI, "mamba_proj_bias": True, "mamba_conv_bias": False}]
)
def test_parameters_are_exactly_those_of_transformers_model(tmp_path, config):
    with torch.device("meta"):
        model = JambaForCausalLM(JambaConfig(**config))
    assert inspect_config(tmp_path, config)["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("named", "bytes_each"),
    [({"dtype": "float32"}, 4), ({"torch_dtype": "float16"}, 2), ({"dtype": "bfloat16"}, 2), ({}, 2)],
)
def test_weight_bytes_from_config_follow_the_type_it_names(tmp_path, named, bytes_each):
    facts = inspect_config(tmp_path, {**REASONING, **named})
    assert facts["weight_bytes"] == bytes_each * facts["parameters"]


# compressed artifacts


def tensor_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a mapping
    return total


def test_a_quantized_checkpoint_counts_what_it_stores(applied):
    facts = inspect(str(applied / "checkpoint"))
    assert_is_the_reference_model(facts)
    assert facts["weight_bytes"] == tensor_bytes(applied / "checkpoint")
    kept = 2972 + 9600 + 1920 + 30720 + 1920 + 5120  # norms, convolution, dt bias, A, D, router
    assert facts["formats"] == {"int8": 7_381_532 - kept, "bf16": kept}


@pytest.mark.parametrize("name", [".", "onnx", "onnx/model.onnx"])
def test_an_onnx_artifact_counts_the_types_it_declares(applied, name):
    """The output of apply, its export or the file: states are float32 in this graph, so KV and convolution double."""
    facts = inspect(str(applied / name))
    assert_is_the_reference_model(facts)
    assert facts["kv_bytes_per_token"] == 2 * 256
    assert facts["ssm_state_bytes"] == 122_880
    assert facts["conv_state_bytes"] == 2 * 11_520
    kept = 2972 + 9600 + 1920 + 30720 + 1920 + 5120
    assert facts["formats"] == {"int8": 7_381_532 - kept, "bf16": kept}


def test_an_onnx_artifact_counts_the_bytes_of_its_weights(applied):
    graph = onnx.load(applied / "onnx" / "model.onnx", load_external_data=False).graph
    lengths = [
        int(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "length"
    ]
    assert len(lengths) > 100
    assert inspect(str(applied / "onnx"))["weight_bytes"] == sum(lengths)


def test_a_tied_onnx_artifact_has_the_parameters_of_its_model(tmp_path):
    source = make_jamba(tmp_path / "source", tie_word_embeddings=True)
    out = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx")
    exported, original = inspect(str(out)), inspect(str(source))
    for name in ("parameters", "active_parameters", "roles", "layers", "experts"):
        assert exported[name] == original[name]
    assert exported["formats"] == {"bf16": original["parameters"]}


# text and command line


def test_the_text_names_every_figure(tiny):
    text = as_text(inspect(str(tiny)))
    for figure in ("7,381,532", "3,695,132", "14,763,064", "256", "122,880", "11,520", "8, 2 active", "attention"):
        assert figure in text
    assert text.count("+moe") == 4


def test_the_command_prints_the_facts_as_json(compress_cli, tiny):
    done = compress_cli("inspect", tiny, "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == inspect(str(tiny))


# refusals


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused():
    with pytest.raises(InputError, match="not a hub id"):
        inspect("no such model")


def test_a_hub_id_without_a_network_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="hub") as caught:
        inspect("nobody/no-such-model")
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither"):
        inspect(str(tmp_path))


def test_a_file_of_another_kind_is_refused(tiny):
    with pytest.raises(InputError, match=r"model\.onnx"):
        inspect(str(tiny / "tokenizer.json"))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**MINI, "model_type": "mamba"}, "'mamba' is not supported"),
        ({**MINI, "dtype": "int3"}, "int3"),
        ({**MINI, "num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({**MINI, "hidden_size": "4096"}, "hidden_size"),
    ],
)
def test_a_configuration_that_cannot_be_counted_is_refused_by_what_is_wrong(tmp_path, config, named):
    with pytest.raises(InputError, match=named):
        inspect_config(tmp_path, config)


def test_a_graph_of_another_tool_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info
    x, y = value("x", onnx.TensorProto.FLOAT, [1]), value("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="not exported by this tool"):
        inspect(str(tmp_path / "model.onnx"))


def test_a_file_that_is_not_onnx_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a readable ONNX model"):
        inspect(str(tmp_path / "model.onnx"))
