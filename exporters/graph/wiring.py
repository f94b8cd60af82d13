"""A model as a graph: embedding, layers and head in a dialect's operators, states as inputs and outputs.

A stage without the embedding takes `hidden_states` in place of `input_ids`, one without the head gives `last_hidden_state` in
place of `logits`, [batch_size, sequence_length, H] in the type of the layer that takes them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

from compress.model.block import Layer
from compress.model.hybrid import HybridModel
from compress.model.weight import Weight
from compress.runtime.graph_names import BATCH, PAST, SEQUENCE, TOTAL, dimensions, past_of, present_of
from exporters.dialects.base import Dialect, Tokens
from exporters.graph.builder import DTYPES, WeightFile, declare, rename
from exporters.graph.form import WHOLE, Form

Advance = Callable[[int], None]
Types = Mapping[str, ir.DataType]  # of hidden states, by unit: "embedding", "layer.0", "head"


def build(
    model: HybridModel,
    dialect: type[Dialect],
    weights: WeightFile,
    advance: Advance,
    form: Form = WHOLE,
    types: Types | None = None,
) -> ir.Graph:
    """The graph of a model, or of a part of it; `advance` hears of the parameters written. `types` are of units whose hidden
    states are in another type than the dialect's. Raises ValueError where a matrix that is stored once would be in two."""
    return _Wiring(model, dialect, weights, advance, form, types or {}).build()


class _Wiring:
    def __init__(
        self,
        model: HybridModel,
        dialect: type[Dialect],
        weights: WeightFile,
        advance: Advance,
        form: Form,
        types: Types,
    ):
        self._model, self._advance, self._form = model, advance, form
        self._types = [
            types.get(unit.name, dialect.body_type) for unit in model.units
        ]  # in order: layer i is unit i + 1
        self._layers = form.layers_of(len(model.layers))
        self._begins, self._ends = self._layers.start == 0, self._layers.stop == len(model.layers)
        if model.is_tied and self._types[0] != self._types[-1]:
            raise ValueError(
                "the embedding and the head share a matrix, which is stored once: they must be of one type"
            )
        self._given = self._declare_given()
        mask = self._declare("attention_mask", ir.DataType.INT64, (BATCH, TOTAL))
        self._inputs, self._states = [self._given, mask], list[ir.Value]()
        self._ops = dialect(dialect.new_graph(weights), Tokens(self._given, mask, form.decode_only))

    def build(self) -> ir.Graph:
        hidden = self._embedded() if self._begins else self._given
        for index in self._layers:
            hidden = self._layer(self._model.layer(index), hidden)
        output = self._logits(hidden) if self._ends else self._handed_on(hidden)
        return self._ops.graph.finish(self._inputs, [output, *self._states], self._model.model_type)

    def _declare_given(self) -> ir.Value:
        if self._begins:
            return self._declare("input_ids", ir.DataType.INT64, (BATCH, SEQUENCE))
        shape = (BATCH, SEQUENCE, self._model.config.hidden_size)
        return self._declare("hidden_states", self._types[self._layers.start + 1], shape)

    def _declare(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        return declare(name, dtype, self._form.shape(shape))

    def _embedded(self) -> ir.Value:
        embedding = self._model.embedding
        ops = self._ops.of({embedding.name: embedding}).in_type(self._types[0])
        hidden = ops.lookup(embedding.name, self._given)
        self._advance(embedding.parameters)
        return self._handed(hidden, 0)

    def _handed(self, hidden: ir.Value, number: int) -> ir.Value:
        """What a unit gives, in the type of the next one."""
        return self._ops.graph.cast(hidden, self._types[number + 1], self._types[number])

    def _layer(self, layer: Layer, hidden: ir.Value) -> ir.Value:
        weights = self._model.unit(f"layer.{layer.index}").weights
        ops = self._ops.of(weights, layer.prefix).in_type(self._types[layer.index + 1])
        layer = ops.as_kept(layer)
        past = {
            spec.name: self._declare(past_of(layer.index, spec), DTYPES[spec.precision.dtype], dimensions(spec, PAST))
            for spec in layer.carried
        }
        self._inputs += past.values()
        hidden, new = layer.run(ops, hidden, past)
        for spec in layer.carried:
            name, shape = present_of(past_of(layer.index, spec)), self._form.shape(dimensions(spec, TOTAL))
            self._states.append(rename(new[spec.name], name, DTYPES[spec.precision.dtype], shape))
        self._advance(_parameters(weights.values()))
        return self._handed(hidden, layer.index + 1)

    def _logits(self, hidden: ir.Value) -> ir.Value:
        """float32, whatever the type of hidden states."""
        model = self._model
        ops = self._ops.of(model.unit("head").weights | model.unit("embedding").weights).in_type(self._types[-1])
        self._advance(_parameters(model.unit("head").weights.values()))
        hidden = ops.rms_norm(hidden, model.final_norm.name, model.config.rms_norm_eps)
        # a stage that never looks a row up stores the tied matrix as any other
        project = ops.tied_head if model.is_tied and self._begins else ops.linear
        logits = ops.graph.float32(project(model.output_matrix.name, hidden))
        shape = self._form.shape((BATCH, SEQUENCE, model.config.vocab_size))
        return rename(logits, "logits", ir.DataType.FLOAT, shape)

    def _handed_on(self, hidden: ir.Value) -> ir.Value:
        """As the layer after the last takes them."""
        shape = self._form.shape((BATCH, SEQUENCE, self._model.config.hidden_size))
        return rename(hidden, "last_hidden_state", self._types[self._layers.stop + 1], shape)


def _parameters(weights: Iterable[Weight]) -> int:
    return sum(weight.parameters for weight in weights)
