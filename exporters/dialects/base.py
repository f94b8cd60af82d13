"""What a dialect is beyond the operators of blocks: which operators it may use, the type of hidden states, and the two ends of
a model."""

import copy
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import onnx_ir as ir

from compress.model.block import Layer
from compress.model.operators import Operators
from compress.model.weight import Weight
from exporters.graph.builder import Graph, WeightFile


@dataclass(frozen=True)
class Tokens:
    """What a graph is given: the new tokens, [B, S] or [B, S, H], and the mask [B, T]. `is_one`: S is 1, and the token is no
    padding."""

    given: ir.Value
    mask: ir.Value
    is_one: bool = False


class Dialect(Operators[ir.Value]):
    """Adds operators to a graph. `of` binds it to the weights of a layer; what is shared between layers is kept in the graph
    (`Graph.once`)."""

    opset: ClassVar[int] = 21
    domains: ClassVar[Mapping[str, int]] = {}  # versions of operators beyond the standard's
    body_type: ClassVar[ir.DataType] = ir.DataType.FLOAT  # of hidden states and weights, where nothing else is said

    def __init__(self, graph: Graph, tokens: Tokens):
        self.graph, self.tokens = graph, tokens
        self._weights: Mapping[str, Weight] = {}
        self._prefix = ""

    @classmethod
    def new_graph(cls, weights: WeightFile) -> Graph:
        return Graph(weights, cls.opset, cls.domains, cls.body_type)

    def of(self, weights: Mapping[str, Weight], prefix: str = "") -> Self:
        """The same dialect on other weights, whose names begin with `prefix`."""
        bound = copy.copy(self)
        bound._weights, bound._prefix = weights, prefix
        return bound

    def in_type(self, body_type: ir.DataType) -> Self:
        """The same dialect where hidden states are of another type."""
        other = copy.copy(self)
        other.graph = self.graph.in_type(body_type)
        return other

    def as_kept(self, layer: Layer) -> Layer:
        """A layer whose states are kept in the precisions in which the graph takes and gives them."""
        return layer

    def weight(self, name: str) -> Weight:
        return self._weights[self._prefix + name]

    @abstractmethod
    def lookup(self, name: str, ids: ir.Value) -> ir.Value:
        """Rows of the embedding: ids [B, S] -> [B, S, H]."""

    @abstractmethod
    def tied_head(self, name: str, x: ir.Value) -> ir.Value:
        """The embedding that was looked up in, once more as the output matrix: x [B, S, H] -> [B, S, V]."""
