"""The twin of a graph that computes in bf16, for which onnxruntime has no kernels on a CPU: the same nodes and the same stored
bytes, computed in float32.

The twin is made from the graph as it was read from its file, so that what is measured is what ships. What is bf16 in the file
stays so where it is stored, comes in, goes out or is cast to, and is cast to float32 where it is used; all else that was bf16 is
float32. So numbers are rounded to bf16 where the file casts to it, such as behind norms and scans, and where a node is marked as
the edge of a block, such as the addition to the hidden states.
"""

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from compress.runtime.graph_names import EDGE_KEY

BF16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
# what onnxruntime moves in bf16, as portable graphs do with states, which they cast before they are used
MOVING = {"Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
TYPES = ("dtype", "output_dtype")  # attributes of operators other than Cast that say what type comes out

FORMATS = {FLOAT.name: "fp32", BF16.name: "bf16", ir.DataType.FLOAT16.name: "fp16"}


def edges(model: ir.Model) -> Counter[str]:
    """How many blocks end in which number format of hidden states, where a graph says so."""
    said = (node.metadata_props.get(EDGE_KEY) for node in model.graph)
    return Counter(FORMATS[name] for name in said if name is not None)


def is_needed(model: ir.Model) -> bool:
    """Whether the graph computes in bf16. One that only stores weights and states in it is run as it is."""
    held = {value for graph in model.graphs() for value in _given(graph)}
    for node in model.graph.all_nodes():
        if _casts_to_bf16(node):
            held.update(node.outputs)
        elif node.op_type != "Cast" and not held.isdisjoint(node.inputs):
            if node.op_type not in MOVING:
                return True
            held.update(node.outputs)
    return False


def become(model: ir.Model) -> None:
    """Makes the twin out of a graph. Inputs, outputs and stored tensors keep their names, types and places."""
    graphs = list(model.graphs())
    for node in list(model.graph.all_nodes()):
        _retype(node)
        if node.metadata_props.get(EDGE_KEY) == BF16.name:
            _round(node.outputs[0])
    for value in list(model.graph.outputs):
        if value.dtype == BF16 and _is_computed(value):
            _round(value)
    for graph in graphs:
        is_body = graph is not model.graph
        for value in _computed(graph, is_body):
            value.type = ir.TensorType(FLOAT)
        for value in _kept(graph, is_body):
            _widen(value, graph, is_body)


def _given(graph: ir.Graph) -> Iterator[ir.Value]:
    """What is stored or comes in as bf16."""
    return (value for value in (*graph.initializers.values(), *graph.inputs) if value.dtype == BF16)


def _casts_to_bf16(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.attributes["to"].as_int() == BF16


def _is_computed(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and not _casts_to_bf16(node)


def _kept(graph: ir.Graph, is_body: bool) -> list[ir.Value]:
    """Values that stay bf16; what comes into a body does not."""
    cast = (value for node in graph if _casts_to_bf16(node) for value in node.outputs)
    return [value for value in (*_given(graph), *cast) if not (is_body and value.is_graph_input())]


def _computed(graph: ir.Graph, is_body: bool) -> Iterator[ir.Value]:
    """Values that become float32."""
    came = graph.inputs if is_body else ()
    made = (value for node in graph for value in node.outputs if _is_computed(value))
    return (value for value in (*came, *made) if value.dtype == BF16)


def _retype(node: ir.Node) -> None:
    """An operator that makes bf16 of something else makes float32."""
    for name in TYPES:
        if name in node.attributes and node.attributes[name].as_int() == BF16:
            node.attributes[name] = ir.AttrInt64(name, FLOAT)
    if "value" in node.attributes and (value := node.attributes["value"].as_tensor()).dtype == BF16:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.numpy().astype(FLOAT.numpy())))


def _round(value: ir.Value) -> None:
    """To bf16, for all that it goes to; a Cast takes its place as an output too."""
    cast, node = _cast(value, BF16)
    is_output, cast.shape = value.is_graph_output(), value.shape
    ir.convenience.replace_all_uses_with(value, cast, replace_graph_outputs=True)
    node.replace_input_with(0, value)
    if is_output:
        cast.name, value.name = value.name, cast.name
    _put_behind(value, node)


def _widen(value: ir.Value, graph: ir.Graph, is_body: bool) -> None:
    """To float32 where it is used, by bodies of operators too; where it is cast anyway it stays as it is."""
    uses = [(node, place) for node, place in value.uses() if node.op_type != "Cast"]
    outputs = [place for place, out in enumerate(graph.outputs) if is_body and out is value]
    if not uses and not outputs:
        return
    cast, node = _cast(value, FLOAT)
    for user, place in uses:
        user.replace_input_with(place, cast)
    for place in outputs:
        graph.outputs[place] = cast
    _put_behind(value, node, graph)


def _cast(value: ir.Value, to: ir.DataType) -> tuple[ir.Value, ir.Node]:
    node = ir.node("Cast", [value], {"to": to}, name=f"{value.name}_to_{to.name.lower()}")
    made = node.outputs[0]
    made.name, made.type = f"{value.name}_as_{to.name.lower()}", ir.TensorType(to)
    return made, node


def _put_behind(value: ir.Value, node: ir.Node, graph: ir.Graph | None = None) -> None:
    """Behind the node that makes the value, or at the beginning of the graph that it comes into."""
    producer = value.producer()
    if producer is not None and producer.graph is not None:
        producer.graph.insert_after(producer, node)
    elif graph is not None:
        graph.insert_before(graph[0], node)
