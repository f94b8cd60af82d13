"""What a parser says, in words of the model: which layer, which operator."""

import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from exporters.engines.job import ParserError

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
SOURCES = re.compile(r"\(?\b[\w/.-]+\.(?:cpp|cc|h|hpp|cu):\d+\)?:?|In function \w+:?|\[\d+\](?= )")
LONGEST = 300
FAR = 1 << 30


def refusal(errors: Sequence[ParserError], graph: ir.Graph) -> str:
    """The first thing that a parser did not take, and how many more there are."""
    if not errors:
        return "it says no reason"
    first, more = errors[0], len(errors) - 1
    rest = f" (and {more} more)" if more else ""
    where = place(graph, first["node"])
    operator = first["operator"] or "operator"
    return f"{where}: {operator} '{first['node']}': {one_line(first['description'])}{rest}"


def one_line(said: str) -> str:
    """Without places in sources that nobody has."""
    return " ".join(SOURCES.sub("", said).split())[:LONGEST]


def place(graph: ir.Graph, node: str) -> str:
    """Such as `layer 3`, or the name of a tensor outside the layers: of the nearest operator which reads one, in their order."""
    outer = list(graph)
    found = next((number for number, each in enumerate(outer) if node in _names(each)), None)
    if found is None:
        return "in the graph"
    read = [_reads(each) for each in outer]
    return min(_nearest(read[found::-1]), _nearest(read[found:]))[1]


def _nearest(read: Sequence[str | None]) -> tuple[int, str]:
    """How many operators away, and what."""
    return next(((away, what) for away, what in enumerate(read) if what is not None), (FAR, "in the graph"))


def _names(node: ir.Node) -> set[str | None]:
    """Of an operator, and of those in its bodies."""
    return {each.name for each in _within(node)}


def _reads(node: ir.Node) -> str | None:
    stored = (
        value.const_value.name
        for each in _within(node)
        for value in each.inputs
        if value is not None and isinstance(value.const_value, ir.ExternalTensor)
    )
    name = next(stored, None)
    if name is None:
        return None
    layer = LAYER.search(name)
    return f"layer {layer[1]}" if layer else f"at '{name}'"


def _within(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for each in attribute.as_graph():
                yield from _within(each)
