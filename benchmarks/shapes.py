"""Random checkpoints of published shapes: `python benchmarks/shapes.py SHAPE FOLDER`. Written a block of rows at a time.

The weights are noise of a trained model's scale, so sizes, times and memory are real and text is not. The tokenizer is
that of the small model of the same family, so that calibration prompts can be read.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch

from compress.checkpoint import writer
from compress.model import families
from compress.model.roles import Role
from compress.model.weight import Spec, Unit, Weight
from compress.recipe import resources
from compress.terminal.progress import task

JAMBA = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "dtype": "bfloat16",
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

NEMOTRON_3_NANO = {
    "model_type": "nemotron_h",
    "architectures": ["NemotronHForCausalLM"],
    "dtype": "bfloat16",
    "hybrid_override_pattern": "ME*",
    "vocab_size": 16384,
    "hidden_size": 2688,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

SHAPES = {
    # AI21 Jamba-Reasoning-3B: dense, embeddings tied; 3.03B parameters, 6.06 GB in bfloat16
    "jamba-reasoning-3b": JAMBA | {
        "vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 20,
        "num_key_value_heads": 1, "attn_layer_period": 14, "attn_layer_offset": 7, "num_experts": 1, "num_experts_per_tok": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 160, "tie_word_embeddings": True,
    },
    # a small MoE Jamba: 1.6B parameters, 16 experts on every other layer
    "moe-1.6b": JAMBA | {
        "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 4, "attn_layer_period": 8, "attn_layer_offset": 4, "num_experts": 16, "num_experts_per_tok": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 64, "tie_word_embeddings": False,
    },
    # the first half of it, for what is to be larger than a cap and done in minutes: 0.83B parameters, 1.66 GB
    "moe-0.8b": JAMBA | {
        "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "attn_layer_period": 8, "attn_layer_offset": 4, "num_experts": 16, "num_experts_per_tok": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_dt_rank": 64, "tie_word_embeddings": False,
    },
    # NVIDIA Nemotron-3-Nano-30B-A3B cut to 3 of 52 layers and 16,384 of 131,072 tokens: 1.45B parameters,
    # of which the mixture of experts has 1.30B, 2.59 GB
    "nemotron-3-nano-cut": NEMOTRON_3_NANO,
    # the same with a quarter of the experts: what grows with their number shows beside it
    "nemotron-3-nano-cut-32": NEMOTRON_3_NANO | {"n_routed_experts": 32},
}  # fmt: skip


def make(shape: str, folder: Path) -> Path:
    """Writes the checkpoint into `folder` (kept where it is complete already) and returns it."""
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape]
    units = [_unit(spec) for spec in families.get(config["model_type"]).parse(config, shape).layout()]
    total = sum(weight.parameters for unit in units for weight in unit.weights.values())
    with task(f"writing {shape}", total) as advance:
        for number, unit in enumerate(units):
            writer.write_shard(unit, folder / writer.shard_name(number, len(units)), advance)
    writer.write_index(folder, tuple(units))
    writer.copy_companions(resources.folder("models") / f"tiny-{config['model_type'].replace('_', '-')}", folder)
    writer.write_config(folder, config)
    return folder


def _unit(spec) -> Unit:
    return Unit(spec.name, {s.name: Weight(s.name, s.role, s.shape, "bf16", _loader(s)) for s in spec.specs})


def _loader(spec: Spec):
    def load(rows: slice | None = None) -> torch.Tensor:
        rows = rows or slice(0, spec.shape[0])
        seed = hashlib.sha256(f"{spec.name}/{rows.start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:8], "little") >> 1)
        return _values(spec, (rows.stop - rows.start, *spec.shape[1:]), generator).to(torch.bfloat16)

    return load


def _values(spec: Spec, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if spec.role == Role.SSM_A:  # Mamba's start, A_log[d, n] = log(n + 1); Mamba-2's heads are spread over 1 to 16
        return torch.log(torch.arange(shape[-1], dtype=torch.float32) % 16 + 1).expand(shape)
    if spec.role in (Role.NORM, Role.SSM_D):
        return torch.ones(shape)
    if spec.role == Role.SSM_DT_BIAS:  # softplus of it is a time step of about 0.01
        return torch.full(shape, -4.6)
    return torch.randn(shape, generator=generator) / max(1, spec.shape[-1]) ** 0.5


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make(arguments.shape, arguments.folder)
    size = sum(path.stat().st_size for path in arguments.folder.iterdir())
    print(json.dumps({"shape": arguments.shape, "bytes": size}))
