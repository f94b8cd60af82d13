"""Looking into exported graphs."""

import onnx


def all_graphs(graph: onnx.GraphProto):
    """The graph and the bodies of its control-flow operators."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)
