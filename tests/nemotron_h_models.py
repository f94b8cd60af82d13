"""Small random Nemotron-H checkpoints, made by transformers so that they are what a user would have."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}

AWKWARD = {
    "vocab_size": 67,
    "hidden_size": 40,
    "layers_block_type": "MEM*-EM*",  # as letters; see `pattern`
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "intermediate_size": 56,
    "mamba_num_heads": 9,
    "mamba_head_dim": 7,
    "n_groups": 3,
    "ssm_state_size": 5,
    "conv_kernel": 4,
    "chunk_size": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 36,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 512,
    "use_mamba_kernels": True,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "awkward": {},  # one KV head, 9 heads of 7 in 3 groups, 6 experts
    "one group": {"n_groups": 1},
    "every head its own group": {"n_groups": 9},
    "one head": {"mamba_num_heads": 1, "n_groups": 1},
    "one state": {"ssm_state_size": 1},
    "heads of one": {"mamba_head_dim": 1},
    "convolution of width 2": {"conv_kernel": 2},
    "convolution without bias": {"use_conv_bias": False},
    "biases": {"use_bias": True, "mlp_bias": True},
    "as many key-value heads as query heads": {"num_key_value_heads": 5},
    "two groups of query heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one expert a token": {"num_experts_per_tok": 1},
    "every expert for every token": {"num_experts_per_tok": 6},
    "groups of experts": {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 3},
    "one group of experts a token": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
    "gates that are not renormalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "latent projections": {"moe_latent_size": 20},
    "latent projections with biases": {"moe_latent_size": 20, "mlp_bias": True},
    "a shared expert as wide as an MLP": {"moe_shared_expert_intermediate_size": 0},
    "no attention": {"layers_block_type": "MEM-E"},
    "no experts": {"layers_block_type": "M-M*-M"},
    "no MLP": {"layers_block_type": "MEM*E"},
    "no Mamba": {"layers_block_type": "*E-*"},
    "Mamba alone": {"layers_block_type": "MM"},
    "attention first": {"layers_block_type": "*M-E"},
    "large epsilon in the norms": {"layer_norm_epsilon": 0.1},
}


def pattern(letters: str) -> list[str]:
    return [PATTERN[letter] for letter in letters]


def configuration(**changes) -> NemotronHConfig:
    """transformers' configuration of the AWKWARD shapes with `changes`."""
    values = {**AWKWARD, **changes}
    return NemotronHConfig(**{**values, "layers_block_type": pattern(values["layers_block_type"])})


def make_nemotron_h(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shards: str | None = None,
                    spread: float = 1.0, **changes) -> Path:  # fmt: skip
    """Saves a random model of the AWKWARD shapes with `changes` (layers as letters) and returns its folder.

    Weights are spread wider than transformers' initialisation, time steps over 0.003 to 1, and the correction biases
    enough to change which experts are chosen, so that every path matters to the logits.
    """
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(configuration(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _draw(name, parameter, spread)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # stays float32, as in the released checkpoints
            buffer.data = torch.empty(buffer.shape).uniform_(-0.3, 0.3)
    model.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return folder


def _draw(name: str, parameter: torch.Tensor, spread: float) -> None:
    if parameter.dim() >= 2:
        parameter.normal_(0, spread / parameter.shape[-1] ** 0.5)
    elif name.endswith("dt_bias"):
        parameter.uniform_(-6.0, 0.5)
    elif name.endswith("A_log"):
        parameter.uniform_(-2.0, 2.5)
    elif name.endswith("bias"):
        parameter.uniform_(-1.0, 1.0)
    else:  # norms and D
        parameter.uniform_(0.5, 1.5)


def load_reference(folder: Path) -> NemotronHForCausalLM:
    """transformers' model in float32: the numerical oracle.

    It floors time steps when it reads several tokens and not when it reads one; no other implementation does, so here the
    floor is 0. Its grouped products of experts need widths that 16 bytes divide: experts are computed one by one.
    """
    return NemotronHForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", time_step_min=0.0
    ).eval()


def add_mtp(folder: Path) -> dict[str, torch.Tensor]:
    """Puts the tensors of a layer that guesses further tokens beside the others; transformers makes none. Returns them."""
    hidden = AWKWARD["hidden_size"]
    shapes = {
        "layers.0.enorm.weight": (hidden,),
        "layers.0.eh_proj.weight": (hidden, 2 * hidden),
        "layers.0.mixer.q_proj.weight": (60, hidden),
        "layers.1.mixer.experts.0.up_proj.weight": (24, hidden),
        "layers.1.mixer.gate.e_score_correction_bias": (6,),
    }
    generator = torch.Generator().manual_seed(5)
    added = {f"mtp.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    added = {name: tensor if name.endswith("_bias") else tensor.bfloat16() for name, tensor in added.items()}
    path, config = folder / "model.safetensors", folder / "config.json"
    save_file(load_file(path) | added, path, metadata={"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}))
    return added
