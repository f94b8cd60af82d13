"""`tensorrt`: what TensorRT's parser takes, strongly typed: hidden states in fp16, bf16 or fp32, scans, sums of norms and
routers in float32, every expert on every token, quantized weights behind DequantizeLinear."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from compress.formats.remembered import Precision
from compress.formats.state_words import Format
from compress.model.block import Layer
from compress.model.routing import Router
from exporters.dialects.portable import Portable
from exporters.graph import dense_moe, moe, qdq, stack
from exporters.graph.builder import Graph, WeightFile, at_edge, width_of, with_width
from exporters.graph.rotation import rotated
from exporters.graph.ssd_by_token import ssd_by_token
from exporters.graph.stored import as_stored, widened
from exporters.graph.typed import TypedGraph

Value = ir.Value
Multiply = Callable[[str, Value, str | None], Value]

FORMATS: dict[ir.DataType, Format] = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT16: "fp16",
}


class TensorRT(Portable):
    """In bf16."""

    opset = 22  # the first whose operators all take bf16
    body_type = ir.DataType.BFLOAT16
    recurrence = staticmethod(ssd_by_token)
    gathers: ClassVar[bool] = False  # the experts of each token, where all can be stacked

    _multiply: Multiply | None = None  # what `linear` does while an expert is looked at, or all of them run at once

    @classmethod
    def new_graph(cls, weights: WeightFile) -> Graph:
        return TypedGraph(weights, cls.opset, cls.domains, cls.body_type)

    def linear(self, name: str, x: Value, bias: str | None = None) -> Value:
        if self._multiply is not None:
            return self._multiply(name, x, bias)
        return qdq.linear(self.graph, x, self.weight(name), None if bias is None else self.weight(bias))

    def add(self, a: Value, b: Value) -> Value:
        """Marked as the edge of a block, for those who compute what lies between in another type."""
        total = super().add(a, b)
        return at_edge(total, a.dtype or self.graph.body_type)

    def as_kept(self, layer: Layer) -> Layer:
        """States that no pass decided on are in the type that arithmetic takes them in, so that nothing is lost by it."""
        undecided = (spec for spec in layer.states if spec.name not in layer.precisions)
        taken = {spec.name: Precision(FORMATS[self.state_type(spec)]) for spec in undecided}
        return replace(layer, precisions={**layer.precisions, **taken})

    def softplus(self, x: Value) -> Value:
        return self.graph.from_float32(self.graph.op("Softplus", self.graph.float32(x)))

    def lookup(self, name: str, ids: Value) -> Value:
        rows = self.graph.op("Gather", self._dense_table(name), ids, axis=0)
        return rotated(self.graph, rows, self.weight(name).rotation)

    def tied_head(self, name: str, x: Value) -> Value:
        """Hidden states are transposed, and not the table: of one in int8 or fp8 TensorRT-RTX 1.7 would keep a second copy."""
        x = self.graph.op("Transpose", qdq.input_of(self.graph, x, self.weight(name)), perm=[0, 2, 1])
        return self.graph.op("Transpose", self.graph.op("MatMul", self._dense_table(name), x), perm=[0, 2, 1])

    def _dense_table(self, name: str) -> Value:
        return self.graph.once(("table", name), lambda: qdq.table(self.graph, self.weight(name)))

    def _mixed(
        self, rows: Value, choice: moe.Choice, top_k: int, experts: int, run: Callable[[int, Value], Value]
    ) -> Value:
        width = width_of(rows)
        groups = stack.groups([self._products(run, e, width) for e in range(experts)])
        if self.gathers and len(groups) == 1:
            gather = partial(self._together, groups[0], run)
            return dense_moe.gathered(self.graph, rows, choice, top_k, width, gather)
        return self._summed(rows, dense_moe.gates(self.graph, choice, experts), groups, run)

    def _summed(
        self, rows: Value, gates: Value, groups: list[stack.Group], run: Callable[[int, Value], Value]
    ) -> Value:
        """rows [tokens, K], gates [tokens, E] -> [tokens, K]."""
        graph, total = self.graph, None
        for group, theirs in zip(groups, self._by_group(gates, groups), strict=True):
            given = dense_moe.mixture(
                graph, rows, theirs, len(group.experts), partial(self._together, group, run, None)
            )
            total = given if total is None else graph.op("Add", total, given)
        assert total is not None  # a mixture has an expert
        return total

    def _by_group(self, gates: Value, groups: list[stack.Group]) -> Sequence[Value]:
        """Columns of gates [tokens, E], those of each group together."""
        graph, order = self.graph, [number for group in groups for number in group.experts]
        if len(groups) == 1:
            return [gates]
        if order != sorted(order):
            gates = graph.op("Gather", gates, graph.constant(order), axis=1)
        return self.split(gates, [len(group.experts) for group in groups])

    def _together(
        self, group: stack.Group, run: Callable[[int, Value], Value], chosen: Value | None, rows: Value
    ) -> Value:
        """rows [1, n, K] -> [E, n, K] of all experts of a group; [m, n, K] -> [m, n, K] of those that are `chosen` [m]."""
        following = iter(group.stacks)
        with self._multiplying(lambda _, x, __: stack.linear(self.graph, x, next(following), chosen)):
            return run(group.experts[0], rows)

    def _products(self, run: Callable[[int, Value], Value], expert: int, width: int) -> list[stack.Product]:
        """What an expert multiplies its rows with. It is run on a graph that is thrown away, and has nothing but its products
        to ask for weights."""
        found, graph, weights, prefix = list[stack.Product](), self.graph, self._weights, self._prefix

        def take_down(name: str, x: Value, bias: str | None) -> Value:
            found.append(stack.Product(weights[prefix + name], None if bias is None else weights[prefix + bias]))
            return with_width(self.graph.op("Identity", x), found[-1].weight.shape[0])

        self.graph, self._weights = graph.inner(), {}
        with self._multiplying(take_down):
            run(expert, with_width(ir.Value(name="rows"), width))
        self.graph, self._weights = graph, weights
        return found

    @contextmanager
    def _multiplying(self, multiply: Multiply) -> Iterator[None]:
        self._multiply = multiply
        yield
        self._multiply = None

    def _choice(self, tokens: Value, router: Router, experts: int) -> moe.Choice:
        """The router's product is in float32 too: which experts a token gets hangs on its last digits."""
        graph = self.graph
        stored = as_stored(graph, self.weight(router.weight), lambda w: w.T)
        logits = graph.op("MatMul", graph.float32(tokens), widened(graph, stored, to=ir.DataType.FLOAT))
        bias = None if router.bias is None else self._float32(router.bias)
        return moe.choose(graph, logits, router, experts, bias)

    def _float32(self, name: str) -> Value:
        return widened(self.graph, as_stored(self.graph, self.weight(name)), to=ir.DataType.FLOAT)


class TensorRTHalf(TensorRT):
    body_type = ir.DataType.FLOAT16


class TensorRTSingle(TensorRT):
    body_type = ir.DataType.FLOAT


OF_PRECISION: dict[str, type[TensorRT]] = {"bf16": TensorRT, "fp16": TensorRTHalf, "fp32": TensorRTSingle}


def gathering(dialect: type[TensorRT]) -> type[TensorRT]:
    """The same, where the experts of each token are gathered."""
    return type(f"{dialect.__name__}Gathering", (dialect,), {"gathers": True})
