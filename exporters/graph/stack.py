"""Matrices of all experts of a layer as one, [E, K, N], and how it is found out which those are.

An expert is run where every product only takes down its name (`Taken`); matrices that are alike in all experts are then multiplied
together, by one MatMul over [1 or E, tokens, K].

    int8, int8-gN, int4-gN, fp8-e4m3    scales [E, K/N, N], one block as long as K where a channel has one scale
    int8-tensor, fp8-e4m3-tensor        scales [E]

So spelled, TensorRT-RTX 1.7 multiplies integers (or fp8) where inputs are rounded, and widens weights within the product where they
are not. As [E N, K] with a scale a row, reshaped after, it widened all weights into memory at every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir
import torch

from compress import formats
from compress.formats.activations import Activation
from compress.model.tensor_names import in_short, written_out
from compress.model.weight import Weight
from exporters.graph.builder import TORCH_TYPES, Graph, with_members, with_width
from exporters.graph.qdq import input_of
from exporters.graph.stored import SCALE, load, packed, stacked, type_of, widened


class Product(NamedTuple):
    """What `linear` was asked for."""

    weight: Weight
    bias: str | None


@dataclass(frozen=True)
class Stack:
    """Matrices [N, K], one of each expert, of one shape and format, whose inputs are rotated and rounded alike."""

    weights: tuple[Weight, ...]

    @property
    def name(self) -> str:
        return in_short(weight.name for weight in self.weights)[0]


def stacks(experts: Sequence[Sequence[Product]]) -> list[Stack] | None:
    """A stack for each product of an expert, in the order they are asked for; None where experts are not alike."""
    if len({len(products) for products in experts}) != 1:
        return None
    together = list(zip(*experts, strict=True))
    if not all(map(_are_alike, together)):
        return None
    return [Stack(tuple(product.weight for product in products)) for products in together]


def _are_alike(products: Sequence[Product]) -> bool:
    names = [product.weight.name for product in products]
    is_one_name = len(in_short(names)) == 1 and written_out(in_short(names)) == names
    kinds = {(w.shape, w.format, w.rotation, _rounding(w.activation)) for w, _ in products}
    return is_one_name and len(kinds) == 1 and all(bias is None for _, bias in products)


def _rounding(activation: Activation | None) -> tuple[str, float | None] | None:
    if activation is None:
        return None
    return activation.format, None if activation.scale is None else activation.scale()


def linear(graph: Graph, x: ir.Value, stack: Stack) -> ir.Value:
    """x [1 or E, n, K], rotated and rounded first where the weights say so, times their transposes: [E, n, N]."""
    first = stack.weights[0]
    return with_width(graph.op("MatMul", input_of(graph, x, first), matrices(graph, stack)), first.shape[0])


def matrices(graph: Graph, stack: Stack) -> ir.Value:
    """[E, K, N] in the type of hidden states, read and written one at a time."""
    first = stack.weights[0]
    if not first.is_quantized:
        return widened(graph, with_members(stacked(graph, stack.name, stack.weights), stack.name))
    scales: list[torch.Tensor] = []

    def values_of(weight: Weight) -> torch.Tensor:
        quantized = load(weight)
        scales.append(quantized.scales.T.to(TORCH_TYPES[graph.body_type]))
        return packed(quantized.values.T, weight.format)

    shape = (len(stack.weights), *reversed(first.shape))
    pieces = map(values_of, stack.weights)  # a generator would hold one while the next is made
    values = graph.stacked(stack.name, first.format, pieces, type_of(first.format), shape)
    return _dequantized(graph, stack, with_members(values, stack.name), torch.stack(scales))


def _dequantized(graph: Graph, stack: Stack, values: ir.Value, scales: torch.Tensor) -> ir.Value:
    """Values [E, K, N] times scales [E, K/b, N]."""
    known, inputs = formats.get(stack.weights[0].format), stack.weights[0].shape[1]
    has_one = known.rows is None
    name = stack.name + SCALE
    stored = with_members(graph.stored(name, scales.flatten() if has_one else scales), name)
    if has_one:
        return graph.op("DequantizeLinear", values, stored, axis=0)
    return graph.op("DequantizeLinear", values, stored, axis=1, block_size=known.columns or inputs)
