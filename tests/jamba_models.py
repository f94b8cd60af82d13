"""Small random Jamba checkpoints, made by transformers so that they are what a user would have."""

import shutil
from pathlib import Path

import torch
from transformers import JambaConfig, JambaForCausalLM

AWKWARD = {
    "vocab_size": 67,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 6,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "expert_layer_period": 3,
    "expert_layer_offset": 1,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "mamba_d_state": 7,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 10,
    "max_position_embeddings": 512,
    "use_mamba_kernels": False,
}

WHOLE_MODEL = {"vocab_size": 2048, "num_hidden_layers": 4, "spread": 0.7}  # of the shipped model's tokenizer
TIED = WHOLE_MODEL | {"tie_word_embeddings": True, "num_experts": 4, "hidden_size": 64, "num_attention_heads": 4,
                      "intermediate_size": 96}  # fmt: skip


def make_jamba(folder: Path, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shards: str | None = None,
               spread: float = 1.5, **changes) -> Path:  # fmt: skip
    """Saves a random model of the AWKWARD shapes with `changes` and returns its folder.

    Weights are spread wider than transformers' initialisation, so that every path matters to the logits. At a `spread`
    of 1.5 rounding grows from layer to layer: float32 itself is then some 5e-4 away from float64.
    """
    torch.manual_seed(seed)
    model = JambaForCausalLM(JambaConfig(**{**AWKWARD, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name:
                parameter.normal_(0, spread / parameter.shape[-1] ** 0.5)
            elif "layernorm" in name or name.endswith(".D"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-1.0, 1.0)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    return folder


def make_whole_model(folder: Path, tiny: Path, **changes) -> Path:
    """A random model with the tokenizer of the shipped one, `tiny`: `changes` are WHOLE_MODEL or TIED, and others."""
    make_jamba(folder, **changes)
    for path in tiny.glob("*token*"):
        shutil.copy(path, folder)
    return folder


def load_reference(folder: Path) -> JambaForCausalLM:
    """transformers' model in float32: the numerical oracle."""
    return JambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def fused(weights: dict[str, torch.Tensor], experts: int) -> dict[str, torch.Tensor]:
    """A checkpoint's weights under transformers' names: experts stacked [E, N, K], gate above up."""
    result = {name: tensor for name, tensor in weights.items() if ".experts." not in name}
    for prefix in {name.split("experts.")[0] + "experts." for name in weights if ".experts." in name}:
        gate, up, down = (
            [weights[f"{prefix}{expert}.{part}_proj.weight"] for expert in range(experts)]
            for part in ("gate", "up", "down")
        )
        result[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])
        result[f"{prefix}down_proj"] = torch.stack(down)
    return result
