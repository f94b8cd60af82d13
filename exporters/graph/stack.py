"""Matrices of a layer's experts as one, [E, K, N], which are multiplied together, by one MatMul over [1 or E, tokens, K].

Experts that are alike in everything stand in one group. Where their inputs are rounded with scales of their own, each is a group:
QuantizeLinear takes a scale for each expert, too, but then TensorRT-RTX 1.7 multiplies what was widened again.

    int8, int8-gN, int4-gN, fp8-e4m3    scales [E, K/N, N], one block as long as K where a channel has one scale
    int8-tensor, fp8-e4m3-tensor        scales [E]

So spelled, it multiplies integers (or fp8) where inputs are rounded, and widens weights within the product where they
are not. As [E N, K] with a scale a row, reshaped after, it widened all weights into memory at every step.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import onnx_ir as ir
import torch

from compress import formats
from compress.formats.activations import Activation
from compress.model.block import Layer
from compress.model.experts import Experts
from compress.model.hybrid import HybridModel
from compress.model.tensor_names import in_short, written_out
from compress.model.weight import Weight
from exporters.graph.builder import TORCH_TYPES, Graph, with_members, with_width
from exporters.graph.qdq import input_of
from exporters.graph.stored import SCALE, load, packed, plain, stacked, type_of, widened


class Product(NamedTuple):
    """What `linear` was asked for."""

    weight: Weight
    bias: Weight | None

    @property
    def kind(self) -> Hashable:
        """Equal where products can be made together; a bias has the name of one expert."""
        weight = self.weight
        bias = None if self.bias is None else self.bias.name
        return weight.shape, weight.format, weight.rotation, _rounding(weight.activation), bias


@dataclass(frozen=True)
class Stack:
    """Matrices [N, K] of several experts, of one shape and format, whose inputs are rotated and rounded alike."""

    weights: tuple[Weight, ...]
    bias: Weight | None = None

    @property
    def name(self) -> str:
        return in_short(weight.name for weight in self.weights)[0]


@dataclass(frozen=True)
class Group:
    """Experts that are run together: their numbers, and a stack for each product in the order they are asked for."""

    experts: tuple[int, ...]
    stacks: tuple[Stack, ...]


def groups(experts: Sequence[Sequence[Product]]) -> list[Group]:
    """Those that are alike in all products together. `experts`: what each of them multiplies."""
    alike: dict[Hashable, list[int]] = {}
    for number, products in enumerate(experts):
        alike.setdefault(tuple(product.kind for product in products), []).append(number)
    return [group for numbers in alike.values() for group in _grouped(numbers, experts)]


def _grouped(numbers: list[int], experts: Sequence[Sequence[Product]]) -> list[Group]:
    """One group; one of each expert where their names are not one in short, which is what a stack is called."""
    together = list(zip(*(experts[number] for number in numbers), strict=True))
    if len(numbers) > 1 and not all(map(_share_a_name, together)):
        return [group for number in numbers for group in _grouped([number], experts)]
    stacks = (Stack(tuple(weight for weight, _ in products), products[0].bias) for products in together)
    return [Group(tuple(numbers), tuple(stacks))]


def why_not_gathered(model: HybridModel) -> str | None:
    """What keeps a token's experts from being taken out of a stack, or None. Calibrated scales are not looked at: they differ,
    and a token's would have to be looked up with its experts."""
    for layer in model.layers:
        if layer.experts is not None:
            for weight, *others in _of_experts(model, layer, layer.experts):
                if weight.activation is not None:
                    return (
                        f"the input of '{weight.name}' is rounded to {weight.activation.format} with a scale of its own"
                    )
                if odd := next((other for other in others if _stored(other) != _stored(weight)), None):
                    return f"'{weight.name}' is {_stored(weight)}, '{odd.name}' {_stored(odd)}"
    return None


def _of_experts(model: HybridModel, layer: Layer, experts: Experts) -> Iterator[list[Weight]]:
    """The matrices that have one part in all experts."""
    weights = model.unit(f"layer.{layer.index}").weights
    for part in experts.parts:
        yield [weights[layer.prefix + experts.prefix(number) + part] for number in range(experts.count)]


def _stored(weight: Weight) -> str:
    rotated = f" rotated in blocks of {weight.rotation}" if weight.rotation else ""
    return f"{weight.format} {list(weight.shape)}{rotated}"


def _share_a_name(products: Sequence[Product]) -> bool:
    names = [product.weight.name for product in products]
    return len(in_short(names)) == 1 and written_out(in_short(names)) == names


def _rounding(activation: Activation | None) -> tuple[str, float | None] | None:
    if activation is None:
        return None
    return activation.format, None if activation.scale is None else activation.scale()


def linear(graph: Graph, x: ir.Value, stack: Stack, chosen: ir.Value | None = None) -> ir.Value:
    """x [1 or E, n, K], rotated and rounded first where the weights say so, times their transposes: [E, n, N]; where numbers
    are `chosen` [m], x [m, n, K] times those of the stack: [m, n, N]."""
    first, whole = stack.weights[0], matrices(graph, stack)
    used = whole if chosen is None else graph.op("Gather", whole, chosen, axis=0)
    y = graph.op("MatMul", input_of(graph, x, first), used)
    return with_width(y if stack.bias is None else graph.op("Add", y, plain(graph, stack.bias)), first.shape[0])


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
