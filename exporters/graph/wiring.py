"""A model as a graph: embedding, layers and head in a dialect's operators, states as inputs and outputs.

A stage without the embedding takes `hidden_states` in place of `input_ids`, one without the head gives `last_hidden_state` in
place of `logits`, [batch_size, sequence_length, H] in the dialect's type.
"""

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from compress.model.block import Layer
from compress.model.hybrid import HybridModel
from compress.model.weight import Weight
from compress.runtime.graph_names import BATCH, PAST, SEQUENCE, TOTAL, dimensions, past_of, present_of
from exporters.dialects.base import Dialect, Tokens
from exporters.graph.builder import DTYPES, WeightFile, declare, rename
from exporters.graph.form import WHOLE, Form

Advance = Callable[[int], None]


def build(
    model: HybridModel, dialect: type[Dialect], weights: WeightFile, advance: Advance, form: Form = WHOLE
) -> ir.Graph:
    """The graph of a model, or of a part of it; `advance` hears of the parameters written."""
    return _Wiring(model, dialect, weights, advance, form).build()


class _Wiring:
    def __init__(self, model: HybridModel, dialect: type[Dialect], weights: WeightFile, advance: Advance, form: Form):
        self._model, self._advance, self._form = model, advance, form
        self._layers = form.layers_of(len(model.layers))
        self._begins, self._ends = self._layers.start == 0, self._layers.stop == len(model.layers)
        self._given = self._declare_given(dialect.body_type)
        mask = self._declare("attention_mask", ir.DataType.INT64, (BATCH, TOTAL))
        self._inputs, self._states = [self._given, mask], list[ir.Value]()
        self._ops = dialect(dialect.new_graph(weights), Tokens(self._given, mask, form.decode_only))

    def build(self) -> ir.Graph:
        hidden = self._embedded() if self._begins else self._given
        for index in self._layers:
            hidden = self._layer(self._model.layer(index), hidden)
        output = self._logits(hidden) if self._ends else self._handed_on(hidden)
        return self._ops.graph.finish(self._inputs, [output, *self._states], self._model.model_type)

    def _declare_given(self, body_type: ir.DataType) -> ir.Value:
        if self._begins:
            return self._declare("input_ids", ir.DataType.INT64, (BATCH, SEQUENCE))
        return self._declare("hidden_states", body_type, (BATCH, SEQUENCE, self._model.config.hidden_size))

    def _declare(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        return declare(name, dtype, self._form.shape(shape))

    def _embedded(self) -> ir.Value:
        embedding = self._model.embedding
        hidden = self._ops.of({embedding.name: embedding}).lookup(embedding.name, self._given)
        self._advance(embedding.parameters)
        return hidden

    def _layer(self, layer: Layer, hidden: ir.Value) -> ir.Value:
        weights = self._model.unit(f"layer.{layer.index}").weights
        past = {
            spec.name: self._declare(past_of(layer.index, spec), DTYPES[spec.precision.dtype], dimensions(spec, PAST))
            for spec in layer.carried
        }
        self._inputs += past.values()
        hidden, new = layer.run(self._ops.of(weights, layer.prefix), hidden, past)
        for spec in layer.carried:
            name, shape = present_of(past_of(layer.index, spec)), self._form.shape(dimensions(spec, TOTAL))
            self._states.append(rename(new[spec.name], name, DTYPES[spec.precision.dtype], shape))
        self._advance(_parameters(weights.values()))
        return hidden

    def _logits(self, hidden: ir.Value) -> ir.Value:
        """float32, whatever the type of hidden states."""
        model = self._model
        ops = self._ops.of(model.unit("head").weights | model.unit("embedding").weights)
        self._advance(_parameters(model.unit("head").weights.values()))
        hidden = ops.rms_norm(hidden, model.final_norm.name, model.config.rms_norm_eps)
        # a stage that never looks a row up stores the tied matrix as any other
        project = ops.tied_head if model.is_tied and self._begins else ops.linear
        logits = ops.graph.float32(project(model.output_matrix.name, hidden))
        shape = self._form.shape((BATCH, SEQUENCE, model.config.vocab_size))
        return rename(logits, "logits", ir.DataType.FLOAT, shape)

    def _handed_on(self, hidden: ir.Value) -> ir.Value:
        shape = self._form.shape((BATCH, SEQUENCE, self._model.config.hidden_size))
        return rename(hidden, "last_hidden_state", self._ops.body_type, shape)


def _parameters(weights: Iterable[Weight]) -> int:
    return sum(weight.parameters for weight in weights)
