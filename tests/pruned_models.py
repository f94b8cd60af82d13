"""Pruned checkpoints made by hand from whole ones, and what they must compute: transformers' whole model in which the MoE
blocks were replaced by a plain one that leaves experts out. Nothing here calls the code under test, but for the writing of
config.json's section."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from jamba_models import load_reference
from safetensors.torch import load_file, save_file
from transformers import JambaForCausalLM

from compress.model.expert_counts import pruned

PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Pruning:
    """`kept`: of each MoE layer, the original numbers of the experts that stay, in their new order. `rows_stay`: the rows
    of removed experts stay in the router, behind the others."""

    kept: dict[int, tuple[int, ...]]
    rows_stay: bool = False

    @property
    def counts(self) -> dict[int, int]:
        return {layer: len(kept) for layer, kept in self.kept.items()}


def prune(source: Path, folder: Path, pruning: Pruning) -> Path:
    """A copy of the checkpoint with fewer experts."""
    folder.mkdir()
    config, tensors = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    for layer, kept in pruning.kept.items():
        tensors = _with_experts(tensors, f"model.layers.{layer}.feed_forward.", kept, pruning.rows_stay)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rows = config["num_experts"] if pruning.rows_stay else None
    config = pruned(config, ("num_experts",), pruning.counts, config["num_hidden_layers"], rows)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(source / "generation_config.json", folder)
    return folder


def _with_experts(tensors: dict, prefix: str, kept: tuple[int, ...], rows_stay: bool) -> dict:
    router = tensors[prefix + "router.weight"]
    removed = [expert for expert in range(len(router)) if expert not in kept]
    result = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    result[prefix + "router.weight"] = router[[*kept, *removed] if rows_stay else list(kept)].clone()
    for new, old in enumerate(kept):
        for part in PARTS:
            result[f"{prefix}experts.{new}.{part}"] = tensors[f"{prefix}experts.{old}.{part}"]
    return result


class PlainMoe(torch.nn.Module):
    """A block of the whole model with experts left out, in float64: every expert that stays runs on every token.

    Where the rows of removed experts stay, a token's gates are shares of all experts; otherwise of those that stay.
    """

    def __init__(self, block, kept: tuple[int, ...], rows_stay: bool):
        super().__init__()
        self.kept, self.rows_stay, self.top_k = kept, rows_stay, block.top_k
        self.router = block.router.weight.detach().double()
        self.gate_up, self.down = (
            block.experts.gate_up_proj.detach().double(),
            block.experts.down_proj.detach().double(),
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        x, result = hidden.double(), torch.zeros_like(hidden, dtype=torch.float64)
        shares = (x @ self.router.T).exp()  # of logits near 1: nothing overflows
        whole = shares.sum(-1) if self.rows_stay else sum(shares[..., expert] for expert in self.kept)
        for expert in self.kept:
            better = sum((shares[..., other] > shares[..., expert]).int() for other in self.kept)
            gate = torch.where(better < self.top_k, shares[..., expert] / whole, 0)
            result += gate[..., None] * self._expert(expert, x)
        return result.to(hidden.dtype)

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.gate_up[expert].T).tensor_split(2, -1)
        return (gate / (1 + (-gate).exp()) * up) @ self.down[expert].T


def expected_model(source: Path, pruning: Pruning) -> JambaForCausalLM:
    """transformers' model of the whole checkpoint in float32, with experts left out."""
    model = load_reference(source)
    for layer, kept in pruning.kept.items():
        block = model.model.layers[layer].feed_forward
        model.model.layers[layer].feed_forward = PlainMoe(block, kept, pruning.rows_stay)
    return model
