"""Looking into exported graphs."""

import onnx


def all_graphs(graph: onnx.GraphProto):
    """The graph and the bodies of its control-flow operators."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_graphs(attribute.g)


def assert_shapes_are_inferred(path, monkeypatch) -> None:
    """onnxruntime's symbolic_shape_infer, without its guesses, tells a shape of every value of the graph."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    monkeypatch.chdir(path.parent)  # where it looks for the weights
    model = onnx.load(path.name, load_external_data=False)
    found = SymbolicShapeInference.infer_shapes(model, auto_merge=False, guess_output_rank=False)
    assert {o for node in model.graph.node for o in node.output} <= {
        v.name for v in (*found.graph.value_info, *found.graph.output)
    }
    declared = [[d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in found.graph.output]
    assert declared[0][:2] == ["batch_size", "sequence_length"] and isinstance(declared[0][2], int)
