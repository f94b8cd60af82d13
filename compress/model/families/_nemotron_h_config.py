"""config.json of a Nemotron-H, validated, in every dialect of its keys that transformers 5.23 reads.

Keys that decide nothing here are not read: `expand` (the inner width is heads times their size), `chunk_size` (rounding
only), `time_step_min`, `time_step_max` and `time_step_floor` (how dt_bias was drawn; transformers also floors time steps
at the first of them when it reads several tokens, and no other implementation does), `rope_theta` and its like (there are
no positions), `attention_bias`, `mamba_proj_bias` and `n_shared_experts` (transformers builds the same tensors whatever
they say, and the tensors of a checkpoint are checked).
"""

import math
from functools import cached_property
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.model.config import MAX_COUNT, MAX_SIZE, size

Kind = Literal["mamba2", "attention", "mlp", "moe"]
LETTERS: dict[str, Kind] = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
WORDS: dict[str, Kind] = {"linear_attention": "mamba2", "full_attention": "attention", "mlp": "mlp", "moe": "moe"}
OLD_WORDS: dict[str, Kind] = {"mamba": "mamba2", "attention": "attention"}  # those of transformers before 5.23
DEFAULT_LAYERS: tuple[Kind, ...] = ("mamba2", "moe", "attention", "mlp")

# the numbers that a kind of layer cannot do without; a model without such layers may have any, 0 too
NEEDED: dict[Kind, tuple[str, ...]] = {
    "mamba2": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"),
    "attention": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "mlp": ("intermediate_size",),
    "moe": ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size"),
}
GROUP_SCORES = 2  # a group of experts is judged by so many of its best


def _named(default: Any, *names: str, **bounds: int) -> Any:
    """A key with several names, of which the first that is there counts."""
    return Field(default, validation_alias=AliasChoices(*names), **bounds)


class NemotronHConfig(BaseModel):
    """The keys of config.json that decide shapes and arithmetic; defaults are those of transformers' NemotronHConfig."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, strict=True)

    vocab_size: int = size(131072)
    hidden_size: int = size(4096)
    stated_layers: int | None = Field(None, validation_alias="num_hidden_layers")
    layer_types: list[str] | None = None
    layers_block_type: list[str] | None = None
    hybrid_override_pattern: str | None = None
    num_attention_heads: int = size(32, least=0)
    num_key_value_heads: int = size(8, least=0)
    # transformers knows the first name, older code the second
    head_dim: int = _named(128, "head_dim", "attention_head_dim", ge=0, le=MAX_SIZE)
    intermediate_size: int = size(21504, least=0)
    mlp_hidden_act: Literal["relu2"] = "relu2"
    mlp_bias: bool = False
    mamba_num_heads: int = size(128, least=0)
    mamba_head_dim: int = size(64, least=0)
    ssm_state_size: int = size(128, least=0)
    n_groups: int = _named(8, "mamba_n_groups", "n_groups", ge=0, le=MAX_SIZE)
    conv_kernel: int = _named(4, "mamba_d_conv", "conv_kernel", ge=2, le=MAX_SIZE)
    use_conv_bias: bool = _named(True, "mamba_conv_bias", "use_conv_bias")
    mamba_hidden_act: Literal["silu", "swish"] = "silu"  # two names of one function
    use_bias: bool = False
    time_step_limit: tuple[float, float] = _named((0.0, math.inf), "mamba_dt_limit", "time_step_limit")
    n_routed_experts: int = _named(8, "num_local_experts", "n_routed_experts", ge=0, le=MAX_COUNT)
    num_experts_per_tok: int = size(2, MAX_COUNT, least=0)
    moe_intermediate_size: int = size(7688, least=0)
    moe_shared_expert_intermediate_size: int = size(7688, least=0)
    moe_latent_size: int | None = size(None)
    n_group: int = size(1, MAX_COUNT, least=0)
    topk_group: int = size(1, MAX_COUNT, least=0)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = Field(1.0, gt=0)
    num_nextn_predict_layers: int = size(0, MAX_COUNT, least=0)
    layer_norm_epsilon: float = Field(1e-5, gt=0)
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = size(4096)
    bos_token_id: int | None = size(1, least=0)
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = size(0, least=0)

    @field_validator("time_step_limit", mode="plain")
    @classmethod
    def _unlimited(cls, value: Any) -> tuple[float, float]:
        """transformers ignores these limits and NVIDIA's own code obeys them: they agree where the limits do nothing."""
        limits = [_as_number(item) for item in value] if isinstance(value, list | tuple) else []
        if len(limits) != 2 or not limits[0] <= 0 or limits[1] != math.inf:
            raise ValueError("time steps are not limited here; expected [0.0, Infinity]")
        return limits[0], limits[1]

    @field_validator("tie_word_embeddings")
    @classmethod
    def _untied(cls, value: bool) -> bool:
        if value:
            raise ValueError("transformers does not tie the output matrix of a Nemotron-H, others do; expected false")
        return value

    @field_validator("sliding_window")
    @classmethod
    def _all_tokens(cls, value: int | None) -> None:
        """transformers ignores a window; a model that was trained with one is another model without."""
        if value is not None:
            raise ValueError("attention sees all tokens here; expected null")

    @field_validator("layer_types", "layers_block_type")
    @classmethod
    def _known_words(cls, value: list[str] | None) -> list[str] | None:
        known = WORDS | OLD_WORDS
        for index, word in enumerate(value or ()):
            if word not in known:
                raise ValueError(f"'{word:.40}' (layer {index}) is no kind of layer; expected {', '.join(known)}")
        return value

    @field_validator("hybrid_override_pattern")
    @classmethod
    def _known_letters(cls, value: str | None) -> str | None:
        for index, letter in enumerate(value or ""):
            if letter not in LETTERS:
                raise ValueError(f"'{letter}' (layer {index}) is no kind of layer; expected {', '.join(LETTERS)}")
        return value

    @model_validator(mode="after")
    def _layers_agree(self):
        """transformers believes the list and says nothing of other counts; NVIDIA's own code stops. A model cut or joined
        by hand has such a config.json, so does this."""
        counts = {key: len(layers) for key, layers in self._stated_layers.items()}
        named, count = next(iter(counts.items()), ("layers_block_type (by default)", len(DEFAULT_LAYERS)))
        if self.stated_layers is not None:
            counts["num_hidden_layers"] = self.stated_layers
        for key, other in counts.items():
            if other != count:
                raise ValueError(f"{key} gives {other} layers, {named} {count}; expected the same number")
        if not 1 <= count <= MAX_COUNT:
            raise ValueError(f"{named} gives {count} layers, expected 1 to {MAX_COUNT}")
        return self

    @model_validator(mode="after")
    def _consistent(self):
        for kind in dict.fromkeys(self.kinds):
            for key in NEEDED[kind]:
                if getattr(self, key) < 1:
                    raise ValueError(f"{key} is {getattr(self, key)}, expected 1 or more: there are {kind} layers")
        if "mamba2" in self.kinds:
            self._refuse_rest("mamba_num_heads", "n_groups")
        if "attention" in self.kinds:
            self._refuse_rest("num_attention_heads", "num_key_value_heads")
        if "moe" in self.kinds:
            refuse_too_many_experts(self.kinds.count("moe"), self.n_routed_experts)
            self._refuse_unroutable(self.n_routed_experts, "n_routed_experts")
        return self

    @model_validator(mode="after")
    def _counts_fit(self):
        """Runs last: the counts are judged by `n_routed_experts` and the top-k, which must be right."""
        moe = [kind == "moe" for kind in self.kinds]
        self.compress.refuse_unfit(moe, self.n_routed_experts, self.num_experts_per_tok)
        if self.compress.router_rows is not None:
            raise ValueError("compress.router_rows: only the denominator of a softmax has rows of removed experts")
        for index in (index for index, is_moe in enumerate(moe) if is_moe):
            count = self.compress.of_layer(index, self.n_routed_experts)
            self._refuse_unroutable(count, f"compress.num_experts_per_layer[{index}]")
        return self

    def _refuse_rest(self, many: str, few: str) -> None:
        if getattr(self, many) % getattr(self, few):
            raise ValueError(f"{many} {getattr(self, many)} is not divisible by {few} {getattr(self, few)}")

    def _refuse_unroutable(self, experts: int, key: str) -> None:
        """Raises ValueError where a router cannot choose from so many experts, which `key` gives."""
        groups, used, top_k = self.n_group, self.topk_group, self.num_experts_per_tok
        if experts % groups:
            raise ValueError(f"{key} {experts} is not divisible by n_group {groups}")
        if experts // groups < GROUP_SCORES:
            raise ValueError(f"{key} {experts} in n_group {groups} leaves a group fewer than {GROUP_SCORES} experts")
        if used > groups:
            raise ValueError(f"topk_group {used} exceeds n_group {groups}")
        if top_k > experts:
            raise ValueError(f"num_experts_per_tok {top_k} exceeds {key} {experts}")
        if top_k > experts // groups * used:
            raise ValueError(f"num_experts_per_tok {top_k} exceeds the {experts // groups * used} experts that "
                             f"topk_group {used} of n_group {groups} hold")  # fmt: skip

    @property
    def _stated_layers(self) -> dict[str, tuple[Kind, ...]]:
        """The layers by each key that lists them; the first counts, as in transformers."""
        words, pattern = WORDS | OLD_WORDS, self.hybrid_override_pattern
        lists = {"layer_types": self.layer_types, "layers_block_type": self.layers_block_type}
        stated = {key: tuple(words[word] for word in names) for key, names in lists.items() if names is not None}
        return stated if pattern is None else stated | {"hybrid_override_pattern": tuple(LETTERS[c] for c in pattern)}

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What every layer is."""
        return next(iter(self._stated_layers.values()), DEFAULT_LAYERS)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.kinds)

    @property
    def num_experts(self) -> int:
        return self.n_routed_experts

    @property
    def rms_norm_eps(self) -> float:
        return self.layer_norm_epsilon

    @property
    def attention_head_dim(self) -> int:
        return self.head_dim

    @property
    def d_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """x, B and C go through one convolution."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def shared_expert_size(self) -> int:
        """transformers takes 0 for not given."""
        return self.moe_shared_expert_intermediate_size or self.intermediate_size

    @property
    def expert_width(self) -> int:
        """Width of what a routed expert reads and gives."""
        return self.moe_latent_size or self.hidden_size


def _as_number(item: Any) -> float:
    """transformers writes infinity as {"__float__": "Infinity"} and reads the bare word too. NaN for anything else."""
    if (
        isinstance(item, dict)
        and item.keys() == {"__float__"}
        and item["__float__"] in ("Infinity", "-Infinity", "NaN")
    ):
        return float(item["__float__"])
    return float(item) if isinstance(item, int | float) and not isinstance(item, bool) else math.nan


def parse_config(values: dict, source: str) -> NemotronHConfig:
    """Validates config.json; raises InputError naming the file and the key."""
    values = dict(values)
    if values.get("num_key_value_heads", 0) is None:  # as transformers means it: one KV head per query head
        values["num_key_value_heads"] = values.get("num_attention_heads", 32)
    return validated(NemotronHConfig, values, source)
