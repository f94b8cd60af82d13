"""Nemotron-H (NVIDIA, arXiv 2504.03624, and Nemotron 3): Mamba-2, attention without positions, MLPs and mixtures of experts,
one of them a layer:  h += mixer(rms_norm(h)).

config.json is read in every dialect of its keys that transformers 5.23 knows. Keys that decide nothing here are not read:
`expand` (the inner width is heads times their size), `chunk_size` (rounding only), `time_step_min`, `time_step_max` and
`time_step_floor` (how dt_bias was drawn; transformers also floors time steps at the first of them when it reads several
tokens, and no other implementation does), `rope_theta` and its like (there are no positions), `attention_bias`,
`mamba_proj_bias` and `n_shared_experts` (transformers builds the same tensors whatever they say, and the tensors of a
checkpoint are checked).
"""

import math
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import field_validator, model_validator

from compress.model.architecture import Architecture, Place
from compress.model.block import Block, Layer, Residual
from compress.model.blocks.attention import Attention
from compress.model.blocks.mamba2 import Mamba2
from compress.model.blocks.mlp import Mlp
from compress.model.blocks.moe import Latent, Moe
from compress.model.config import (
    MAX_COUNT,
    Config,
    CountOrNone,
    Positive,
    Size,
    SizeOrNone,
    Width,
    named,
    refuse_unroutable,
)
from compress.model.roles import Role
from compress.model.routing import Router
from compress.strict.json_text import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["mamba2", "attention", "mlp", "moe"]
LETTERS: dict[str, Kind] = {"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}
WORDS: dict[str, Kind] = {"linear_attention": "mamba2", "full_attention": "attention", "mlp": "mlp", "moe": "moe"}
OLD_WORDS: dict[str, Kind] = {"mamba": "mamba2", "attention": "attention"}  # those of transformers before 5.23
LISTS = ("layer_types", "layers_block_type", "hybrid_override_pattern")  # of layers; the first that is there counts
DEFAULT_LAYERS: tuple[Kind, ...] = ("mamba2", "moe", "attention", "mlp")

# the numbers that a kind of layer cannot do without; a model without such layers may have any, 0 too
NEEDED: dict[Kind, tuple[str, ...]] = {
    "mamba2": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size"),
    "attention": ("num_attention_heads", "num_key_value_heads", "head_dim"),
    "mlp": ("intermediate_size",),
    "moe": ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "moe_intermediate_size"),
}
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>up_proj|down_proj)\.weight")
STACK = re.compile(r"(?P<experts>.+\.experts)\.(?P<part>up_proj|down_proj)")
INFINITE = {"Infinity": math.inf, "-Infinity": -math.inf}


class NemotronHConfig(Config):
    """The keys of config.json that decide shapes and arithmetic; defaults are those of transformers' NemotronHConfig."""

    vocab_size: Size = 131072
    hidden_size: Size = 4096
    num_hidden_layers: int = 0  # judged below, beside the lists it must agree with
    layer_types: list[str] | None = None
    layers_block_type: list[str] | None = None
    hybrid_override_pattern: str | None = None
    num_attention_heads: SizeOrNone = 32
    num_key_value_heads: SizeOrNone = 8
    # transformers knows the first name, older code the second
    head_dim: SizeOrNone = named(128, "head_dim", "attention_head_dim")
    intermediate_size: SizeOrNone = 21504
    mlp_hidden_act: Literal["relu2"] = "relu2"
    mlp_bias: bool = False
    mamba_num_heads: SizeOrNone = 128
    mamba_head_dim: SizeOrNone = 64
    ssm_state_size: SizeOrNone = 128
    n_groups: SizeOrNone = named(8, "mamba_n_groups", "n_groups")
    conv_kernel: Width = named(4, "mamba_d_conv", "conv_kernel")
    use_conv_bias: bool = named(True, "mamba_conv_bias", "use_conv_bias")
    mamba_hidden_act: Literal["silu", "swish"] = "silu"  # two names of one function
    use_bias: bool = False
    time_step_limit: tuple[float, float] = named((0.0, math.inf), "mamba_dt_limit", "time_step_limit")
    n_routed_experts: CountOrNone = named(8, "num_local_experts", "n_routed_experts")
    num_experts_per_tok: CountOrNone = 2
    moe_intermediate_size: SizeOrNone = 7688
    moe_shared_expert_intermediate_size: SizeOrNone = 7688
    moe_latent_size: Size | None = None
    n_group: CountOrNone = 1
    topk_group: CountOrNone = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: Positive = 1.0
    num_nextn_predict_layers: CountOrNone = 0
    rms_norm_eps: Positive = named(1e-5, "layer_norm_epsilon")
    sliding_window: int | None = None
    max_position_embeddings: Size = 4096
    bos_token_id: SizeOrNone | None = 1
    eos_token_id: int | list[int] | None = 2
    pad_token_id: SizeOrNone | None = 0

    @classmethod
    def adapted(cls, values: JsonObject) -> JsonObject:
        """transformers saves no number of layers."""
        layers = next((values[key] for key in LISTS if values.get(key) is not None), DEFAULT_LAYERS)
        counted = {"num_hidden_layers": len(layers) if isinstance(layers, str | list | tuple) else 0}
        return super().adapted(values | (counted if values.get("num_hidden_layers") is None else {}))

    @field_validator("time_step_limit", mode="plain")
    @classmethod
    def _unlimited(cls, value: object) -> tuple[float, float]:
        """transformers ignores these limits and NVIDIA's own code obeys them: they agree where the limits do nothing.
        transformers writes infinity as {"__float__": "Infinity"} and reads the bare word too."""
        limits = [
            INFINITE.get(str(item.get("__float__")), math.nan) if isinstance(item, dict) else item
            for item in (value if isinstance(value, list | tuple) else ())
        ]
        numbers = [item for item in limits if isinstance(item, int | float) and not isinstance(item, bool)]
        if len(limits) != 2 or numbers != limits or not limits[0] <= 0 or limits[1] != math.inf:
            raise ValueError("time steps are not limited here; expected [0.0, Infinity]")
        return float(limits[0]), float(limits[1])

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

    @field_validator(*LISTS)
    @classmethod
    def _known(cls, value: list[str] | str | None) -> list[str] | str | None:
        known = LETTERS if isinstance(value, str) else WORDS | OLD_WORDS
        for index, word in enumerate(value or ()):
            if word not in known:
                raise ValueError(f"'{word:.40}' (layer {index}) is no kind of layer; expected {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _layers_agree(self) -> "NemotronHConfig":
        """transformers believes the list and says nothing of other counts; NVIDIA's own code stops. A model cut or joined
        by hand has such a config.json, so does this."""
        counts = {key: len(layers) for key, layers in self._stated_layers.items()}
        first, count = next(iter(counts.items()), ("layers_block_type (by default)", len(DEFAULT_LAYERS)))
        for key, other in (counts | {"num_hidden_layers": self.num_hidden_layers}).items():
            if other != count:
                raise ValueError(f"{key} gives {other} layers, {first} {count}; expected the same number")
        if not 1 <= count <= MAX_COUNT:
            raise ValueError(f"{first} gives {count} layers, expected 1 to {MAX_COUNT}")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "NemotronHConfig":
        """The counts that pruning left are judged last: by `n_routed_experts` and the top-k, which must be right."""
        for kind in dict.fromkeys(self.kinds):
            for key in NEEDED[kind]:
                if getattr(self, key) < 1:
                    raise ValueError(f"{key} is {getattr(self, key)}, expected 1 or more: there are {kind} layers")
        if "mamba2" in self.kinds:
            self.refuse_rest("mamba_num_heads", "n_groups")
        if "attention" in self.kinds:
            self.refuse_rest("num_attention_heads", "num_key_value_heads")
        if "moe" in self.kinds:
            self.refuse_too_many_experts(self.kinds.count("moe"), self.n_routed_experts)
            self._refuse_unroutable(self.n_routed_experts, "n_routed_experts")
        moe = [kind == "moe" for kind in self.kinds]
        self.compress.refuse_unfit(moe, self.n_routed_experts, self.num_experts_per_tok)
        if self.compress.router_rows is not None:
            raise ValueError("compress.router_rows: only the denominator of a softmax has rows of removed experts")
        for index in (index for index, is_moe in enumerate(moe) if is_moe):
            self._refuse_unroutable(self.experts_of(index), f"compress.num_experts_per_layer[{index}]")
        return self

    def _refuse_unroutable(self, experts: int, key: str) -> None:
        refuse_unroutable(experts, key, self.num_experts_per_tok, self.n_group, self.topk_group)

    @property
    def _stated_layers(self) -> dict[str, tuple[Kind, ...]]:
        """The layers by each key that lists them."""
        known = LETTERS | WORDS | OLD_WORDS
        listed = {key: getattr(self, key) for key in LISTS}
        return {key: tuple(known[word] for word in words) for key, words in listed.items() if words is not None}

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """What every layer is."""
        return next(iter(self._stated_layers.values()), DEFAULT_LAYERS)

    @property
    def total_experts(self) -> int:
        return self.n_routed_experts

    def experts_of(self, index: int) -> int:
        """Experts of an MoE layer."""
        return self.compress.of_layer(index, self.n_routed_experts)


class NemotronH(Architecture):
    CONFIG = NemotronHConfig
    EMBEDDING: ClassVar[str] = "backbone.embeddings.weight"
    FINAL_NORM: ClassVar[str] = "backbone.norm_f.weight"
    EXPERTS_KEYS: ClassVar[tuple[str, ...]] = ("n_routed_experts", "num_local_experts")
    TRAVELLING: ClassVar[tuple[str, ...]] = ("mtp.",)
    WITHOUT_TRAVELLERS: ClassVar[JsonObject] = {"num_nextn_predict_layers": 0}
    config: NemotronHConfig

    def layer(self, index: int) -> Layer:
        config, makers = self.config, {"mamba2": self._mamba, "attention": self._attention, "mlp": self._mlp}
        kind = config.kinds[index]
        mixer = self._moe(config.experts_of(index)) if kind == "moe" else makers[kind]()
        residual = Residual("norm.weight", mixer, config.rms_norm_eps)
        return Layer(index, f"backbone.layers.{index}.", config.hidden_size, (residual,))

    def _mamba(self) -> Block:
        config = self.config
        return Mamba2(
            "mixer.", config.hidden_size, config.mamba_num_heads, config.mamba_head_dim, config.n_groups,
            config.ssm_state_size, config.conv_kernel, config.rms_norm_eps, config.use_conv_bias, config.use_bias,
        )  # fmt: skip

    def _attention(self) -> Block:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return Attention("mixer.", config.hidden_size, heads, kv_heads, config.head_dim)

    def _mlp(self) -> Block:
        config = self.config
        return Mlp("mixer.", config.hidden_size, config.intermediate_size, gated=False, bias=config.mlp_bias)

    def _moe(self, experts: int) -> Block:
        """Routed experts have no biases. transformers takes a shared expert of width 0 for one as wide as an MLP."""
        config = self.config
        hidden, latent_size, bias = config.hidden_size, config.moe_latent_size, config.mlp_bias
        width = config.moe_shared_expert_intermediate_size or config.intermediate_size
        router = Router(
            "mixer.gate.weight", experts, config.num_experts_per_tok, "sigmoid", "mixer.gate.e_score_correction_bias",
            config.n_group, config.topk_group, config.norm_topk_prob, config.routed_scaling_factor,
        )  # fmt: skip
        names = ("mixer.fc1_latent_proj.weight", "mixer.fc2_latent_proj.weight")
        return Moe(
            "mixer.experts.", hidden, config.moe_intermediate_size, experts, router, gated=False,
            shared=Mlp("mixer.shared_experts.", hidden, width, gated=False, bias=bias, role=Role.SHARED_EXPERTS),
            latent=Latent(latent_size, *names, bias) if latent_size else None,
        )  # fmt: skip

    def names_of_stored(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
        """Newer checkpoints say `model.`, and those saved as transformers has them in memory stack the experts of a layer."""
        if {"backbone", "model"} <= {name.split(".")[0] for name in shapes}:
            raise ValueError("some tensors begin with 'backbone.' and some with 'model.'; expected one of the two")
        return {name: self._names_of(re.sub(r"^model\.", "backbone.", name), shapes[name]) for name in shapes}

    def _names_of(self, name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        match = STACK.fullmatch(name)
        if match is None or len(shape) != 3 or not 1 <= shape[0] <= MAX_COUNT:
            return (name,)
        return tuple(f"{match['experts']}.{number}.{match['part']}.weight" for number in range(shape[0]))

    def transformers_place(self, name: str) -> Place:
        """transformers says `model.`, and stacks the experts of a layer: up_proj [E, F, K] and down_proj [E, K, F]."""
        name = re.sub(r"^backbone\.", "model.", name)
        if match := EXPERT.fullmatch(name):
            return Place(f"{match['experts']}.{match['part']}", (int(match["number"]),))
        return Place(name)

    def fit_transformers(self, model: "PreTrainedModel") -> None:
        """The mixtures that pruning left; no floor under time steps; and what decides the scan's decays in float32, whatever
        type the rest is loaded in."""
        from compress.model.families import _transformers_moe  # imports transformers, which only this needs

        model.config.time_step_min = 0.0
        for layer in self.layers:
            path = f"model.layers.{layer.index}.mixer"
            if layer.experts:
                _transformers_moe.fit(model, path, "gate", self.EXPERTS_KEYS[0], layer.experts)
            elif layer.kind == "mamba2":
                mixer = model.get_submodule(path)
                vars(mixer)["time_step_limit"] = (0.0, math.inf)
                for name in ("A_log", "D", "dt_bias"):
                    setattr(mixer, name, torch.nn.Parameter(getattr(mixer, name).float()))
