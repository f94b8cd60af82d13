"""A thin builder over onnx-ir: operators as method calls, weights streamed to the data file as they are added."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

DATA = "model.onnx.data"
ALIGN, ALIGN_LARGE, LARGE = 64, 4096, 1 << 20  # large weights begin on a page so that a runtime can map them

DTYPES = {
    np.dtype(np.float32): ir.DataType.FLOAT,
    np.dtype(np.int8): ir.DataType.INT8,
    np.dtype(np.int64): ir.DataType.INT64,
}


class WeightFile:
    """The external data of one model, written in the order weights are added; nothing stays in memory."""

    def __init__(self, folder: Path):
        self._folder, self._file = folder, open(folder / DATA, "wb")  # noqa: SIM115 - closed by the exporter

    def add(self, name: str, array: np.ndarray) -> ir.ExternalTensor:
        offset = self._file.tell()
        step = ALIGN_LARGE if array.nbytes >= LARGE else ALIGN
        self._file.write(b"\0" * (-offset % step))
        offset += -offset % step
        array.tofile(self._file)
        return ir.ExternalTensor(
            DATA,
            offset,
            array.nbytes,
            DTYPES[array.dtype],
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._folder,
        )

    def close(self) -> None:
        self._file.close()


class Graph:
    """A graph, or the body of a control-flow operator, under construction.

    Values made in an enclosing graph may be used in a body. Names are unique over the whole model.
    """

    def __init__(self, weights: WeightFile, opset: int, _names: itertools.count | None = None):
        self._weights, self._opset = weights, opset
        self._names = _names or itertools.count()
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._constants: dict[tuple, ir.Value] = {}

    def body(self) -> "Graph":
        return Graph(self._weights, self._opset, self._names)

    def unique_name(self, stem: str) -> str:
        return f"{stem}_{next(self._names)}"

    def op(self, kind: str, *inputs: ir.Value | None, outputs: int = 1, **attributes):
        """Adds a node; returns its output, or a tuple where `outputs` is more than one."""
        node = ir.node(kind, list(inputs), attributes, num_outputs=outputs, name=self.unique_name(kind))
        for value in node.outputs:
            value.name = self.unique_name("v")
        self._nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, value, dtype=np.int64) -> ir.Value:
        """A small tensor stored in the graph itself; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(ir.Tensor(array, name=self.unique_name("c")))
        return self._constants[key]

    def weight(self, name: str, array: np.ndarray) -> ir.Value:
        """A weight, stored in the data file."""
        return self._initializer(self._weights.add(name, np.ascontiguousarray(array)))

    def _initializer(self, tensor) -> ir.Value:
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self._initializers.append(value)
        return value

    def shape_of(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension as an int64 tensor [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """0 keeps a dimension, -1 is inferred, as in ONNX."""
        return self.op("Reshape", value, self.constant(shape))

    def finish(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        return ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports={"": self._opset},
            name=name,
        )


def declare(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """A typed input (or the declaration of an output); strings name dynamic dimensions."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def rename(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Makes a node's output a graph output with a name, a type and a shape."""
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value
