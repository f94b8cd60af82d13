"""config.json of a Jamba, validated."""

import math
from typing import Annotated, Literal

from optimum.utils.normalized_config import NormalizedTextConfigWithGQA
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compress.errors import InputError
from compress.model.expert_counts import SECTION
from compress.model.records import Compressed

MAX_COUNT = 10_000  # of layers and of experts: far beyond any model, keeps a corrupt config from being enumerated
MAX_EXPERTS_IN_ALL = 50_000
MAX_SIZE = 1 << 31


def _size(default: int, most: int = MAX_SIZE, least: int = 1):
    return Field(default, ge=least, le=most)


class JambaConfig(BaseModel):
    """The keys of config.json that decide shapes and arithmetic; defaults are those of transformers' JambaConfig."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)

    vocab_size: int = _size(65536)
    hidden_size: int = _size(4096)
    intermediate_size: int = _size(14336)
    num_hidden_layers: int = _size(32, MAX_COUNT)
    num_attention_heads: int = _size(32)
    num_key_value_heads: int = _size(8)
    head_dim: int | None = _size(None)
    num_experts: int = _size(16, MAX_COUNT)
    num_experts_per_tok: int = _size(2, MAX_COUNT)
    expert_layer_period: int = _size(2)
    expert_layer_offset: int = _size(1, least=0)
    attn_layer_period: int = _size(8)
    attn_layer_offset: int = _size(4, least=0)
    mamba_d_state: int = _size(16)
    mamba_d_conv: int = _size(4, least=2)
    mamba_expand: int = _size(2)
    mamba_dt_rank: Annotated[int, _size(...)] | Literal["auto"] = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    rms_norm_eps: float = Field(1e-6, gt=0)
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = False
    max_position_embeddings: int = _size(262144)
    bos_token_id: int | None = _size(1, least=0)
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = _size(0, least=0)
    compress: Compressed = Compressed()  # what passes left that other keys cannot say

    @model_validator(mode="after")
    def _consistent(self):
        for kind in ("expert", "attn"):
            period, offset = getattr(self, f"{kind}_layer_period"), getattr(self, f"{kind}_layer_offset")
            if offset >= period:
                raise ValueError(f"{kind}_layer_offset {offset} must be smaller than {kind}_layer_period {period}")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_experts > 1 and self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}")
        if self.num_hidden_layers * self.num_experts > MAX_EXPERTS_IN_ALL:
            raise ValueError(
                f"{self.num_hidden_layers} layers of {self.num_experts} experts are more than any model has"
            )
        return self

    @model_validator(mode="after")
    def _counts_fit(self):
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


class JambaNormalizedConfig(NormalizedTextConfigWithGQA):
    """optimum's names for a Jamba configuration, plus those of its states."""

    HEAD_DIM = "attention_head_dim"
    CONV_KERNEL = "mamba_d_conv"
    STATE_SIZE = "mamba_d_state"
    CONTEXT_LENGTH = "max_position_embeddings"


def parse_config(values: dict, source: str) -> JambaConfig:
    """Validates config.json; raises InputError naming the file and the key."""
    values = dict(values)
    if values.get("num_key_value_heads", 0) is None:  # transformers reads null as one KV head per query head
        values["num_key_value_heads"] = values.get("num_attention_heads", 32)
    try:
        return JambaConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        inside = None if first["loc"][:1] == (SECTION,) else 1  # of other keys pydantic adds what it tried
        key = ".".join(str(part) for part in first["loc"][:inside])
        message = first["msg"].removeprefix("Value error, ")
        given = f" (it is {first['input']!r:.80})" if key else ""
        raise InputError(f"{source}: {key + ': ' if key else ''}{message}{given}") from None
