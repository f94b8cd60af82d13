"""What a parser says, in words of the model: which layer, which operator."""

import re
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from exporters.engines.job import ParserError

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
# places in sources that nobody has, and what a builder puts in front of an error
SOURCES = re.compile(
    r"\(?\[[\w/.-]+\.(?:cpp|h|cu):[^]]*\]|\(?\b[\w/.-]+\.(?:cpp|h|cu):\d+\)?:?"
    r"|\bIn (?:function )?\w+:?(?: at /\S+)?|^I\w+::\w+: Error Code \d+: (?:API Usage Error \()?"
)
MISSING = re.compile(r"plugin.* not found|No importer registered|creator && ", re.IGNORECASE | re.DOTALL)
NAME = re.compile(r"\b[A-Z]\w*_\d+\b")  # of an operator, as our graphs call them
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
    why = "it has no such operator" if MISSING.search(first["description"]) else one_line(first["description"])
    return f"{where}: {operator} '{first['node']}': {why}{rest}"


def failure(said: str, graph: ir.Graph) -> str:
    """Of a build, with the layer of the first operator it names."""
    names = {name for node in graph for name in _names(node)}
    named = next((name for name in NAME.findall(said) if name in names), None)
    return one_line(said) if named is None else f"{place(graph, named)}: {one_line(said)}"


def one_line(said: str) -> str:
    return " ".join(SOURCES.sub("", said).split()).strip(" ;()")[:LONGEST]


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
