"""Jamba (AI21, arXiv 2403.19887 and 2408.12570): Mamba-1 layers, some attention layers, some MoE feed-forwards.

Every layer is  h += mixer(rms_norm(h));  h += feed_forward(rms_norm(h)).  Tensor names are those of transformers'
checkpoints, where every expert has its own 2-D matrices.
"""

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from compress.model import layers
from compress.model.families import _jamba_config
from compress.model.families._jamba_config import JambaConfig
from compress.model.hybrid import Fold, InputGroup, LayerGroups, Place, Weights
from compress.model.names import layer_of
from compress.model.roles import Role
from compress.model.weight import Spec, UnitSpec

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.final_layernorm.weight", "lm_head.weight"
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<part>gate|up|down)_proj\.weight")
ROUTER = "feed_forward.router.weight"

State = dict[str, torch.Tensor]

parse_config, normalized = _jamba_config.parse_config, _jamba_config.JambaNormalizedConfig


def layer_kind(config: JambaConfig, index: int) -> str:
    return "attention" if index % config.attn_layer_period == config.attn_layer_offset else "mamba"


def num_experts(config: JambaConfig, index: int) -> int:
    """Experts of a layer's feed-forward; 1 means a dense MLP."""
    if index % config.expert_layer_period != config.expert_layer_offset:
        return 1
    return config.compress.of_layer(index, config.num_experts)


def router_rows(config: JambaConfig, index: int) -> int:
    """Rows of a layer's router: its experts, then those of removed experts that stay in the softmax's denominator."""
    return config.compress.router_rows or num_experts(config, index)


def active_share(config: JambaConfig, spec: Spec) -> float:
    """The share of a tensor that works on one token: top-k of the experts, all of anything else."""
    if spec.role != Role.EXPERTS:
        return 1.0
    return config.num_experts_per_tok / num_experts(config, layer_of(spec.name))


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


def layout(config: JambaConfig) -> Iterator[UnitSpec]:
    """Every unit in order of computation, lazily: a caller may stop at the first surprise."""
    yield UnitSpec("embedding", (Spec(EMBEDDING, (config.vocab_size, config.hidden_size), Role.EMBEDDING),))
    for index in range(config.num_hidden_layers):
        yield UnitSpec(f"layer.{index}", tuple(_layer_specs(config, index)))
    head = [Spec(FINAL_NORM, (config.hidden_size,), Role.NORM)]
    if not config.tie_word_embeddings:
        head.append(Spec(LM_HEAD, (config.vocab_size, config.hidden_size), Role.LM_HEAD))
    yield UnitSpec("head", tuple(head))


def _layer_specs(config: JambaConfig, index: int) -> Iterator[Spec]:
    mixer = _attention_specs(config) if layer_kind(config, index) == "attention" else _mamba_specs(config)
    norms = (
        ("input_layernorm.weight", (config.hidden_size,), Role.NORM),
        ("pre_ff_layernorm.weight", (config.hidden_size,), Role.NORM),
    )
    for name, shape, role in (norms[0], *mixer, norms[1], *_feed_forward_specs(config, index)):
        yield Spec(layer_prefix(index) + name, shape, role)


def _attention_specs(config: JambaConfig):
    hidden, head = config.hidden_size, config.attention_head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "self_attn.q_proj.weight", (queries, hidden), Role.ATTENTION_QKV
    yield "self_attn.k_proj.weight", (keys, hidden), Role.ATTENTION_QKV
    yield "self_attn.v_proj.weight", (keys, hidden), Role.ATTENTION_QKV
    yield "self_attn.o_proj.weight", (hidden, queries), Role.ATTENTION_OUT


def _mamba_specs(config: JambaConfig):
    hidden, inner, rank, state = config.hidden_size, config.d_inner, config.dt_rank, config.mamba_d_state
    yield "mamba.in_proj.weight", (2 * inner, hidden), Role.SSM_IN
    if config.mamba_proj_bias:
        yield "mamba.in_proj.bias", (2 * inner,), Role.SSM_IN
    yield "mamba.conv1d.weight", (inner, 1, config.mamba_d_conv), Role.SSM_CONV
    if config.mamba_conv_bias:
        yield "mamba.conv1d.bias", (inner,), Role.SSM_CONV
    yield "mamba.x_proj.weight", (rank + 2 * state, inner), Role.SSM_X_PROJ
    for name, size in (("dt", rank), ("b", state), ("c", state)):
        yield f"mamba.{name}_layernorm.weight", (size,), Role.NORM
    yield "mamba.dt_proj.weight", (inner, rank), Role.SSM_DT_PROJ
    yield "mamba.dt_proj.bias", (inner,), Role.SSM_DT_BIAS
    yield "mamba.A_log", (inner, state), Role.SSM_A
    yield "mamba.D", (inner,), Role.SSM_D
    yield "mamba.out_proj.weight", (hidden, inner), Role.SSM_OUT
    if config.mamba_proj_bias:
        yield "mamba.out_proj.bias", (hidden,), Role.SSM_OUT


def _feed_forward_specs(config: JambaConfig, index: int):
    hidden, inner, experts = config.hidden_size, config.intermediate_size, num_experts(config, index)
    if experts == 1:
        yield from _mlp_specs("feed_forward.", hidden, inner, Role.MLP)
        return
    yield ROUTER, (router_rows(config, index), hidden), Role.ROUTER
    for expert in range(experts):
        yield from _mlp_specs(expert_prefix(expert), hidden, inner, Role.EXPERTS)


def _mlp_specs(prefix: str, hidden: int, inner: int, role: Role):
    yield prefix + "gate_proj.weight", (inner, hidden), role
    yield prefix + "up_proj.weight", (inner, hidden), role
    yield prefix + "down_proj.weight", (hidden, inner), role


def initial_state(config: JambaConfig, index: int, batch: int, device: str = "cpu") -> State:
    """The empty past of one layer, in the shapes of the glossary in `layers.py`."""
    if layer_kind(config, index) == "attention":
        shape = (batch, config.num_key_value_heads, 0, config.attention_head_dim)
        return {"key": torch.zeros(shape, device=device), "value": torch.zeros(shape, device=device)}
    return {
        "conv_state": torch.zeros(batch, config.d_inner, config.mamba_d_conv - 1, device=device),
        "recurrent_state": torch.zeros(batch, config.mamba_d_state, config.d_inner, device=device),
    }


def transformers_place(config: JambaConfig, name: str) -> Place:
    """Where a tensor belongs in transformers' model, which fuses the experts of a layer: gate_up_proj [E, 2 F, H], gate
    above up, and down_proj [E, H, F]."""
    match = EXPERT.fullmatch(name)
    if not match:
        return Place(name)
    experts, number, inner = match["experts"], int(match["number"]), config.intermediate_size
    if match["part"] == "down":
        return Place(f"{experts}.down_proj", (number,))
    rows = slice(0, inner) if match["part"] == "gate" else slice(inner, 2 * inner)
    return Place(f"{experts}.gate_up_proj", (number, rows))


def fit_transformers(config: JambaConfig, model) -> None:
    """Gives transformers' empty model the feed-forwards that pruning left, and routers that choose as ours do."""
    from compress.model.families import _jamba_blocks  # imports transformers' modelling code, which only this needs

    for index in range(config.num_hidden_layers):
        if num_experts(config, index) > 1:
            _jamba_blocks.replace(model, index, num_experts(config, index), router_rows(config, index))


def input_groups(config: JambaConfig, index: int) -> LayerGroups:
    """The matrices of a layer by the input they share, in the order in which they are computed."""
    if layer_kind(config, index) == "attention":
        mixer = ((_group("self_attn.", "q", "k", "v"),), (_group("self_attn.", "o"),))
    else:
        mixer = tuple((_group("mamba.", name),) for name in ("in", "x", "dt", "out"))
    prefixes = [(None, "feed_forward.")]
    if num_experts(config, index) > 1:
        prefixes = [(e, expert_prefix(e)) for e in range(num_experts(config, index))]
    feed = tuple(
        tuple(_group(prefix, *names, expert=e) for e, prefix in prefixes) for names in (("gate", "up"), ("down",))
    )
    return LayerGroups(mixer, feed)


def _group(prefix: str, *names: str, expert: int | None = None) -> InputGroup:
    return InputGroup(tuple(f"{prefix}{name}_proj.weight" for name in names), expert)


def folds(config: JambaConfig, index: int) -> tuple[Fold, ...]:
    """Where a factor per channel can move from the input of matrices into what produces it, without a change of output.

    The norm before a MoE feeds the router too, which is divided along with the experts: routing stays as it was. The
    input of x_proj is not listed: the convolution's SiLU stands before it. Nor is that of dt_proj: its norm is only of
    use to one small matrix.
    """
    groups = input_groups(config, index)
    first = Fold("input_layernorm.weight", groups.mixer[0][0].names)
    gate_and_up = tuple(name for group in groups.feed_forward[0] for name in group.names)
    router = (ROUTER,) if num_experts(config, index) > 1 else ()
    inner = tuple(Fold(group.names[0].replace("down_proj", "up_proj"), group.names) for group in groups.feed_forward[1])
    return (first, Fold("pre_ff_layernorm.weight", gate_and_up, router), *inner)


def forward(config: JambaConfig, index: int, weights: Weights, hidden, state: State, mask=None):
    """One layer on hidden states [B, S, H], for prefill and decode alike.

    `mask` [B, past + S] is 1 for tokens and 0 for left padding, or None. Returns hidden states and the new state.
    """
    hidden, state = mix(config, index, weights, hidden, state, mask)
    return feed_forward(config, index, weights, hidden), state


def mix(config: JambaConfig, index: int, weights: Weights, hidden, state: State, mask=None):
    """The first half of a layer: h + mixer(rms_norm(h)), and the new state."""
    mixer = _attention if layer_kind(config, index) == "attention" else _mamba
    normed = layers.rms_norm(hidden, weights("input_layernorm.weight"), config.rms_norm_eps)
    mixed, state = mixer(config, weights, normed, state, mask)
    return hidden + mixed, state


def feed_forward(config: JambaConfig, index: int, weights: Weights, hidden, only: set[int] | None = None):
    """The second half of a layer: h + feed_forward(rms_norm(h)). `only` limits it to some experts, to look at them."""
    x = feed_forward_input(config, weights, hidden)
    if num_experts(config, index) == 1:
        return hidden + _mlp(weights, "feed_forward.", x)
    gates = layers.gates(router_logits(weights, x), config.num_experts_per_tok, num_experts(config, index))
    return hidden + layers.moe(x, gates, lambda e, rows: expert(weights, e, rows), only)


def router_logits(weights: Weights, x):
    """x [..., H] -> [..., R]: what decides which experts a token goes to."""
    return layers.router_logits(x, weights(ROUTER))


def feed_forward_input(config: JambaConfig, weights: Weights, hidden):
    """What the router and every expert see."""
    return layers.rms_norm(hidden, weights("pre_ff_layernorm.weight"), config.rms_norm_eps)


def expert(weights: Weights, number: int, rows):
    """One expert on rows [n, H]."""
    return _mlp(weights, expert_prefix(number), rows)


def expert_hidden(weights: Weights, number: int, rows):
    """What one expert's down_proj multiplies, [n, F], for rows [n, H]."""
    gate, up = (
        lambda x, n=part: weights.linear(f"{expert_prefix(number)}{n}_proj.weight", x) for part in ("gate", "up")
    )
    return layers.swiglu_hidden(rows, gate, up)


def expert_prefix(number: int) -> str:
    """What the names of an expert's tensors begin with, within its layer."""
    return f"feed_forward.experts.{number}."


def _mlp(weights: Weights, prefix: str, x):
    return layers.swiglu(
        x, *(lambda x, n=part: weights.linear(f"{prefix}{n}_proj.weight", x) for part in ("gate", "up", "down"))
    )


def _attention(config: JambaConfig, weights: Weights, x, state: State, mask):
    def heads(name):
        projected = weights.linear(f"self_attn.{name}_proj.weight", x)
        return projected.unflatten(2, (-1, config.attention_head_dim)).transpose(1, 2)

    key, value = torch.cat([state["key"], heads("k")], 2), torch.cat([state["value"], heads("v")], 2)
    mixed = layers.attention(heads("q"), key, value, mask)
    output = weights.linear("self_attn.o_proj.weight", mixed.transpose(1, 2).flatten(2))
    return output, {"key": key, "value": value}


def _mamba(config: JambaConfig, weights: Weights, x, state: State, mask):
    bias = (lambda name: weights(f"mamba.{name}.bias")) if config.mamba_proj_bias else (lambda name: None)
    conv_bias = weights("mamba.conv1d.bias") if config.mamba_conv_bias else None
    new = None if mask is None else mask[:, -x.shape[1] :].to(x.dtype)
    keep = 1.0 if new is None else new[:, :, None]
    x, gate = weights.linear("mamba.in_proj.weight", x, bias("in_proj")).chunk(2, dim=2)
    x, conv_state = layers.causal_conv(x * keep, state["conv_state"], weights("mamba.conv1d.weight"), conv_bias, new)
    x = F.silu(x)
    dt, b, c = _time_step_and_matrices(config, weights, x)
    a = -torch.exp(weights("mamba.A_log")).T
    y, recurrent_state = layers.selective_scan(x, dt * keep, a, b, c, weights("mamba.D"), state["recurrent_state"])
    output = weights.linear("mamba.out_proj.weight", y * F.silu(gate), bias("out_proj"))
    return output, {"conv_state": conv_state, "recurrent_state": recurrent_state}


def _time_step_and_matrices(config: JambaConfig, weights: Weights, x):
    """dt [B, S, D], b and c [B, S, N] from the scan's input; Jamba normalises each, unlike Mamba."""
    low_rank, b, c = weights.linear("mamba.x_proj.weight", x).split(
        [config.dt_rank, config.mamba_d_state, config.mamba_d_state], dim=2
    )
    low_rank, b, c = (
        layers.rms_norm(t, weights(f"mamba.{name}_layernorm.weight"), config.rms_norm_eps)
        for name, t in (("dt", low_rank), ("b", b), ("c", c))
    )
    return F.softplus(weights.linear("mamba.dt_proj.weight", low_rank, weights("mamba.dt_proj.bias"))), b, c
