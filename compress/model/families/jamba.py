"""Jamba (AI21, arXiv 2403.19887 and 2408.12570): Mamba-1 layers, some attention layers, some MoE feed-forwards.

Every layer is  h += mixer(rms_norm(h));  h += feed_forward(rms_norm(h)).  Tensor names are those of transformers'
checkpoints, where every expert has its own 2-D matrices.
"""

import re
from typing import TYPE_CHECKING, ClassVar

from compress.model.architecture import Architecture, Place
from compress.model.block import Block, Layer, Residual
from compress.model.blocks.attention import Attention
from compress.model.blocks.mamba1 import Mamba1
from compress.model.blocks.mlp import Mlp
from compress.model.blocks.moe import Moe
from compress.model.families._jamba_config import JambaConfig
from compress.model.routing import Router

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")


class Jamba(Architecture):
    CONFIG = JambaConfig
    EMBEDDING: ClassVar[str] = "model.embed_tokens.weight"
    FINAL_NORM: ClassVar[str] = "model.final_layernorm.weight"
    EXPERTS_KEYS: ClassVar[tuple[str, ...]] = ("num_experts",)
    config: JambaConfig

    def layer(self, index: int) -> Layer:
        config = self.config
        is_attention = index % config.attn_layer_period == config.attn_layer_offset
        mixer = self._attention() if is_attention else self._mamba()
        halves = (("input_layernorm.weight", mixer), ("pre_ff_layernorm.weight", self._feed_forward(index)))
        residuals = tuple(Residual(norm, block, config.rms_norm_eps) for norm, block in halves)
        return Layer(index, f"model.layers.{index}.", config.hidden_size, residuals)

    def _attention(self) -> Block:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return Attention("self_attn.", config.hidden_size, heads, kv_heads, config.attention_head_dim)

    def _mamba(self) -> Block:
        config = self.config
        return Mamba1(
            "mamba.", config.hidden_size, config.d_inner, config.mamba_d_state, config.mamba_d_conv, config.dt_rank,
            config.rms_norm_eps, conv_bias=config.mamba_conv_bias, proj_bias=config.mamba_proj_bias,
        )  # fmt: skip

    def _feed_forward(self, index: int) -> Block:
        """Dense, or experts whose gates are a softmax over all of them, not made to sum to one over the chosen."""
        config = self.config
        hidden, inner, experts = config.hidden_size, config.intermediate_size, config.experts_of(index)
        if experts == 1:
            return Mlp("feed_forward.", hidden, inner, gated=True)
        rows = config.compress.router_rows or experts
        router = Router("feed_forward.router.weight", rows, config.num_experts_per_tok)
        return Moe("feed_forward.experts.", hidden, inner, experts, router, gated=True)

    def transformers_place(self, name: str) -> Place:
        """transformers fuses the experts of a layer: gate_up_proj [E, 2 F, H], gate above up, and down_proj [E, H, F]."""
        match = EXPERT.fullmatch(name)
        if not match:
            return Place(name)
        experts, number, inner = match["experts"], int(match["number"]), self.config.intermediate_size
        if match["part"] == "down":
            return Place(f"{experts}.down_proj", (number,))
        rows = slice(0, inner) if match["part"] == "gate" else slice(inner, 2 * inner)
        return Place(f"{experts}.gate_up_proj", (number, rows))

    def fit_transformers(self, model: "PreTrainedModel") -> None:
        """The feed-forwards that pruning left, and routers that choose as ours do."""
        from compress.model.families import _transformers_moe  # imports transformers, which only this needs

        for layer in self.layers:
            if layer.experts:
                path = f"{layer.prefix}feed_forward"
                _transformers_moe.fit(model, path, "router", self.EXPERTS_KEYS[0], layer.experts)
