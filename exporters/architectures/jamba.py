"""Jamba as an ONNX graph: the same wiring as `compress/architectures/jamba.py`, block by block."""

import onnx_ir as ir
import torch

from compress.model.families import jamba
from compress.model.families.jamba import JambaConfig
from compress.model.hybrid import HybridModel
from compress.model.weight import Weight
from exporters.graph import blocks
from exporters.graph.attention import attention, causal_bias
from exporters.graph.builder import Graph, declare, rename
from exporters.graph.mamba import causal_conv, selective_scan, token_mask
from exporters.graph.moe import moe
from exporters.graph.stored import matrix, plain, widened
from exporters.graph.table import Table

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


def state_shapes(config: JambaConfig, index: int, length: int | str) -> dict[str, list[int | str]]:
    """Names and shapes of one layer's states, as the contract (and onnxruntime-genai) names them."""
    if jamba.layer_kind(config, index) == "attention":
        shape = [BATCH, config.num_key_value_heads, length, config.attention_head_dim]
        return {"key": shape, "value": shape}
    return {
        "conv_state": [BATCH, config.d_inner, config.mamba_d_conv - 1],
        "recurrent_state": [BATCH, config.mamba_d_state, config.d_inner],
    }


class JambaGraph:
    """Builds the graph unit by unit; `advance` hears of the parameters written."""

    def __init__(self, model: HybridModel, graph: Graph, advance):
        self._model, self._config, self._graph, self._advance = model, model.config, graph, advance
        self.inputs = [
            declare("input_ids", ir.DataType.INT64, [BATCH, SEQUENCE]),
            declare("attention_mask", ir.DataType.INT64, [BATCH, TOTAL]),
        ]
        self.outputs: list[ir.Value] = []

    def build(self) -> ir.Graph:
        ids, mask = self.inputs
        graph, embedding = self._graph, self._model.unit("embedding").weights[jamba.EMBEDDING]
        table = Table(graph, embedding)
        self._advance(embedding.parameters)
        hidden = table.lookup(ids)
        self._keep, self._real = token_mask(graph, ids, mask)
        for index in range(self._config.num_hidden_layers):
            hidden = self._layer(index, hidden)
        logits = rename(
            self._head(hidden, table), "logits", ir.DataType.FLOAT, [BATCH, SEQUENCE, self._config.vocab_size]
        )
        return graph.finish(self.inputs, [logits, *self.outputs], "jamba")

    def _layer(self, index: int, hidden: ir.Value) -> ir.Value:
        graph, eps = self._graph, self._config.rms_norm_eps
        weights = _Named(self._model, index)
        mixer = self._attention if jamba.layer_kind(self._config, index) == "attention" else self._mamba
        past = [
            declare(f"past_key_values.{index}.{n}", ir.DataType.FLOAT, s)
            for n, s in state_shapes(self._config, index, PAST).items()
        ]
        mixed, present = mixer(weights, blocks.rms_norm(graph, hidden, weights("input_layernorm.weight"), eps), past)
        for value, (name, shape) in zip(present, state_shapes(self._config, index, TOTAL).items(), strict=True):
            self.outputs.append(rename(value, f"present.{index}.{name}", ir.DataType.FLOAT, shape))
        self.inputs += past
        hidden = graph.op("Add", hidden, mixed)
        normed = blocks.rms_norm(graph, hidden, weights("pre_ff_layernorm.weight"), eps)
        hidden = graph.op("Add", hidden, self._feed_forward(index, weights, normed))
        self._advance(weights.parameters)
        return hidden

    def _attention(self, weights: "_Named", x: ir.Value, past: list[ir.Value]):
        graph, config = self._graph, self._config
        query, key, value = (blocks.linear(graph, x, weights(f"self_attn.{n}_proj.weight")) for n in "qkv")
        bias = graph.once("causal bias", lambda: causal_bias(graph, *self.inputs[:2], past[0]))
        mixed, key, value = attention(
            graph, query, key, value, *past, bias, config.num_key_value_heads, config.attention_head_dim
        )
        return blocks.linear(graph, mixed, weights("self_attn.o_proj.weight")), (key, value)

    def _mamba(self, weights: "_Named", x: ir.Value, past: list[ir.Value]):
        graph, config = self._graph, self._config
        bias = (lambda name: weights(f"mamba.{name}.bias")) if config.mamba_proj_bias else (lambda name: None)
        x, gate = graph.op(
            "Split",
            blocks.linear(graph, x, weights("mamba.in_proj.weight"), bias("in_proj")),
            outputs=2,
            axis=-1,
            num_outputs=2,
        )
        x = graph.op("Mul", x, self._keep)
        kernel = plain(graph, weights("mamba.conv1d.weight"), lambda w: w[:, 0].T)
        conv_bias = plain(graph, weights("mamba.conv1d.bias")) if config.mamba_conv_bias else None
        x, conv_state = causal_conv(graph, x, past[0], self._real, kernel, conv_bias, config.mamba_d_conv)
        x = blocks.silu(graph, x)
        dt, b, c = self._time_step_and_matrices(weights, x)
        sizes = config.mamba_d_state, config.d_inner
        a_log = weights("mamba.A_log")
        stored = graph.weight(a_log.name, a_log.format, torch.t(a_log.load(None)))
        y, state = selective_scan(graph, x, dt, lambda body: _decay(body, stored), b, c, past[1], sizes)
        y = graph.op("Add", y, graph.op("Mul", x, plain(graph, weights("mamba.D"))))
        y = graph.op("Mul", y, blocks.silu(graph, gate))
        return blocks.linear(graph, y, weights("mamba.out_proj.weight"), bias("out_proj")), (conv_state, state)

    def _time_step_and_matrices(self, weights: "_Named", x: ir.Value):
        """dt [B, S, D], zero on padding; b and c [B, S, N]."""
        graph, config = self._graph, self._config
        sizes = graph.constant([config.dt_rank, config.mamba_d_state, config.mamba_d_state])
        parts = graph.op("Split", blocks.linear(graph, x, weights("mamba.x_proj.weight")), sizes, outputs=3, axis=-1)
        low_rank, b, c = (
            blocks.rms_norm(graph, part, weights(f"mamba.{name}_layernorm.weight"), config.rms_norm_eps)
            for name, part in zip(("dt", "b", "c"), parts, strict=True)
        )
        dt = graph.op(
            "Softplus", blocks.linear(graph, low_rank, weights("mamba.dt_proj.weight"), weights("mamba.dt_proj.bias"))
        )
        return graph.op("Mul", dt, self._keep), b, c

    def _feed_forward(self, index: int, weights: "_Named", x: ir.Value) -> ir.Value:
        """x [B, S, H] -> [B, S, H], dense or with as many experts as this layer has."""

        def mlp(prefix: str):
            return tuple(weights(f"{prefix}{part}_proj.weight") for part in ("gate", "up", "down"))

        count = jamba.num_experts(self._config, index)
        if count == 1:
            return blocks.swiglu(self._graph, x, *mlp("feed_forward."))
        router = matrix(self._graph, weights(jamba.ROUTER))
        experts = [mlp(jamba.expert_prefix(e)) for e in range(count)]
        rows = jamba.router_rows(self._config, index)
        return moe(self._graph, x, router, rows, experts, self._config.num_experts_per_tok)

    def _head(self, hidden: ir.Value, table: Table) -> ir.Value:
        graph, weights = self._graph, self._model.unit("head").weights
        self._advance(sum(weight.parameters for weight in weights.values()))
        hidden = blocks.rms_norm(graph, hidden, weights[jamba.FINAL_NORM], self._config.rms_norm_eps)
        if jamba.LM_HEAD not in weights:
            return table.project(hidden)
        return blocks.linear(graph, hidden, weights[jamba.LM_HEAD])


def _decay(body: Graph, a_log: ir.Value) -> ir.Value:
    """A = -exp(A_log), [N, D]."""
    return body.op("Neg", body.op("Exp", widened(body, a_log)))


class _Named:
    """A layer's weights by their name within it."""

    def __init__(self, model: HybridModel, index: int):
        self._weights, self._prefix = model.unit(f"layer.{index}").weights, jamba.layer_prefix(index)

    def __call__(self, name: str) -> Weight:
        return self._weights[self._prefix + name]

    @property
    def parameters(self) -> int:
        return sum(weight.parameters for weight in self._weights.values())


def build(model: HybridModel, graph: Graph, advance) -> ir.Graph:
    return JambaGraph(model, graph, advance).build()
