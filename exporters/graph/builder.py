"""A thin builder over onnx-ir: operators as method calls, weights streamed to the data file as they are added."""

import itertools
import os
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

ALIGN, ALIGN_LARGE, LARGE = 64, 4096, 1 << 20  # large weights begin on a page so that a runtime can map them
FLOAT, FP8 = np.float32, ir.DataType.FLOAT8E4M3FN.numpy()  # of constants
FORMAT_KEY = "format"  # metadata of a stored weight: its number format, which its type alone does not tell

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float16: ir.DataType.FLOAT16,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
}


class WeightFile:
    """The external data of one model, written in the order weights are added; nothing stays in memory."""

    def __init__(self, path: Path):
        self._path, self._file = path, open(path, "wb")  # noqa: SIM115 - closed by the exporter

    def add(self, name: str, tensor: torch.Tensor, dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
        """Appends the tensor's bytes; `dtype` and `shape` say what they are (which packed INT4 values do not show)."""
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        offset = self._file.tell()
        step = ALIGN_LARGE if data.nbytes >= LARGE else ALIGN
        self._file.write(b"\0" * (-offset % step))
        offset += -offset % step
        self._file.write(data.data)
        return ir.ExternalTensor(
            self._path.name, offset, data.nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=self._path.parent
        )

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
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
        self._made: dict[Hashable, ir.Value] = {}

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

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` adds to the graph, added once for all that ask with an equal key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def stored(self, name: str, tensor: torch.Tensor, dtype: ir.DataType | None = None, shape=None) -> ir.Value:
        """A tensor in the data file; `dtype` and `shape` where they are not those of the torch tensor."""
        shape = tensor.shape if shape is None else shape
        return self._initializer(self._weights.add(name, tensor, dtype or DTYPES[tensor.dtype], shape))

    def weight(self, name: str, number_format: str, tensor: torch.Tensor, dtype=None, shape=None) -> ir.Value:
        """A weight in the data file, with its number format; what belongs to one, such as scales, is only `stored`."""
        value = self.stored(name, tensor, dtype, shape)
        value.const_value.metadata_props[FORMAT_KEY] = number_format
        return value

    def _initializer(self, tensor) -> ir.Value:
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self._initializers.append(value)
        return value

    def shape_of(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension as an int64 tensor [1]."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def row_max(self, value: ir.Value) -> ir.Value:
        """[..., K] -> the largest of each row, [..., 1].

        onnxruntime's symbolic_shape_infer knows no shape of a ReduceMax, but it takes that of the indices of a
        GatherElements: zeros, [..., 1], change nothing else. (TopK and ArgMax, which it knows, take 25 times as long.)
        """
        largest = self.op("ReduceMax", value, self.constant([-1]), keepdims=1)
        shape = self.op("Concat", self.op("Shape", value, end=-1), self.constant([1]), axis=0)
        zeros = self.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.int64)))
        return self.op("GatherElements", largest, zeros, axis=-1)

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
