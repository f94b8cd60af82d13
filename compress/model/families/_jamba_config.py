"""config.json of a Jamba, validated."""

import math
from typing import Literal, Self

from pydantic import model_validator

from compress.model.config import Config, Count, Positive, Size, SizeOrNone, Width


class JambaConfig(Config):
    """The keys of config.json that decide shapes and arithmetic; defaults are those of transformers' JambaConfig."""

    vocab_size: Size = 65536
    hidden_size: Size = 4096
    intermediate_size: Size = 14336
    num_hidden_layers: Count = 32
    num_attention_heads: Size = 32
    num_key_value_heads: Size = 8
    head_dim: Size | None = None
    num_experts: Count = 16
    num_experts_per_tok: Count = 2
    expert_layer_period: Size = 2
    expert_layer_offset: SizeOrNone = 1
    attn_layer_period: Size = 8
    attn_layer_offset: SizeOrNone = 4
    mamba_d_state: Size = 16
    mamba_d_conv: Width = 4
    mamba_expand: Size = 2
    mamba_dt_rank: Size | Literal["auto"] = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    rms_norm_eps: Positive = 1e-6
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = False
    max_position_embeddings: Size = 262144
    bos_token_id: SizeOrNone | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: SizeOrNone | None = 0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for kind in ("expert", "attn"):
            period, offset = getattr(self, f"{kind}_layer_period"), getattr(self, f"{kind}_layer_offset")
            if offset >= period:
                raise ValueError(f"{kind}_layer_offset {offset} must be smaller than {kind}_layer_period {period}")
        if self.head_dim is None:
            self.refuse_rest("hidden_size", "num_attention_heads")
        self.refuse_rest("num_attention_heads", "num_key_value_heads")
        if self.num_experts > 1 and self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        self.refuse_too_many_experts(self.num_hidden_layers, self.num_experts)
        return self

    @model_validator(mode="after")
    def _counts_fit(self) -> Self:
        """Runs last: the counts are judged by `num_experts` and the top-k, which must be right."""
        period, offset, is_moe = self.expert_layer_period, self.expert_layer_offset, self.num_experts > 1
        moe = [is_moe and index % period == offset for index in range(self.num_hidden_layers)]
        self.compress.refuse_unfit(moe, self.num_experts, self.num_experts_per_tok)
        return self

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def d_inner(self) -> int:
        return self.mamba_expand * self.hidden_size

    @property
    def dt_rank(self) -> int:
        return math.ceil(self.hidden_size / 16) if self.mamba_dt_rank == "auto" else self.mamba_dt_rank

    @property
    def total_experts(self) -> int:
        return self.num_experts

    def experts_of(self, index: int) -> int:
        """Experts of a layer's feed-forward; 1 means a dense MLP."""
        if index % self.expert_layer_period != self.expert_layer_offset:
            return 1
        return self.compress.of_layer(index, self.num_experts)
