"""A thin builder over onnx-ir: operators as method calls, weights streamed to the data file as they are added."""

import copy
import itertools
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import ClassVar, TypeVar, cast

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray

from compress.runtime.graph_names import EDGE_KEY

ALIGN, ALIGN_LARGE, LARGE = 64, 4096, 1 << 20  # large weights begin on a page so that a runtime can map them
FLOAT, FP8 = np.float32, ir.DataType.FLOAT8E4M3FN.numpy()  # of constants
FORMAT_KEY = "format"  # metadata of a stored weight: its number format, which its type alone does not tell
MEMBERS_KEY = "members"  # metadata of a stack: the names of what lies in it, in short (compress/model/tensor_names.py)
WIDTH_KEY = "width"  # what the builder knows of a value's last dimension; not written

T = TypeVar("T")
Dimension = int | str | ir.SymbolicDim
Attribute = int | float | str | Sequence[int] | ir.DataType | ir.Graph | ir.TensorProtocol

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float16: ir.DataType.FLOAT16,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8,
}
TORCH_TYPES = {dtype: kind for kind, dtype in DTYPES.items()}


class WeightFile:
    """The external data of one model, written in the order weights are added; nothing stays in memory."""

    def __init__(self, path: Path):
        self._path, self._file = path, open(path, "wb")  # noqa: SIM115 - closed by the exporter

    def add(self, name: str, tensor: torch.Tensor, dtype: ir.DataType, shape: Sequence[int]) -> ir.ExternalTensor:
        """Appends the tensor's bytes; `dtype` and `shape` say what they are (which packed INT4 values do not show)."""
        return self.add_pieces(name, (tensor,), dtype, shape)

    def add_pieces(
        self, name: str, pieces: Iterable[torch.Tensor], dtype: ir.DataType, shape: Sequence[int]
    ) -> ir.ExternalTensor:
        """Appends one tensor whose bytes come piece by piece, so that it is never held whole. Raises ValueError where they
        are not as many as `dtype` and `shape` say."""
        size = -(-math.prod(shape) * dtype.bitwidth // 8)
        offset = self._aligned(size)
        written = sum(map(self._append, pieces))  # a loop would hold a piece while the next is made
        if written != size:
            raise ValueError(f"'{name}': {written} bytes were given; {dtype.name} {list(shape)} takes {size}")
        place = self._path.name, offset, size, dtype
        return ir.ExternalTensor(*place, shape=ir.Shape(shape), name=name, base_dir=self._path.parent)

    def _aligned(self, size: int) -> int:
        """Where a tensor of so many bytes may begin."""
        end = self._file.tell()
        padding = -end % (ALIGN_LARGE if size >= LARGE else ALIGN)
        self._file.write(b"\0" * padding)
        return end + padding

    def _append(self, piece: torch.Tensor) -> int:
        data = piece.contiguous().view(-1).view(torch.uint8).numpy()
        self._file.write(data.data)
        return int(data.nbytes)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class Graph:
    """A graph, or the body of a control-flow operator, under construction.

    `domains` are the versions of operators beyond the standard's; hidden states are of `body_type`. Values made in an
    enclosing graph may be used in a body. Names are unique over the whole model.
    """

    unmoved: ClassVar[Set[ir.DataType]] = {ir.DataType.FLOAT8E4M3FN}  # that no Concat takes before opset 24

    def __init__(
        self,
        weights: WeightFile,
        opset: int,
        domains: Mapping[str, int] | None = None,
        body_type: ir.DataType = ir.DataType.FLOAT,
        _names: Iterator[int] | None = None,
    ):
        self.body_type = body_type
        self._weights, self._versions = weights, {"": opset, **(domains or {})}
        self._names = _names or itertools.count()
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._constants: dict[Hashable, ir.Value] = {}
        self._made: dict[Hashable, object] = {}
        self._by_type = {body_type: self}

    def inner(self) -> "Graph":
        """The body of a control-flow operator."""
        return Graph(self._weights, self._versions[""], self._versions, self.body_type, self._names)

    def in_type(self, body_type: ir.DataType) -> "Graph":
        """The same graph where hidden states are of another type, as in a layer that needs a wider one. What is made `once`
        is made once for each type."""
        if body_type not in self._by_type:
            other = copy.copy(self)
            other.body_type, other._made = body_type, {}
            self._by_type[body_type] = other
        return self._by_type[body_type]

    def unique_name(self, stem: str) -> str:
        return f"{stem}_{next(self._names)}"

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Adds a node of one output. An operator beyond the standard's is written with its domain, `com.microsoft::Gelu`."""
        return self.several(1, kind, *inputs, **attributes)[0]

    def several(
        self, outputs: int, kind: str, *inputs: ir.Value | None, **attributes: Attribute
    ) -> tuple[ir.Value, ...]:
        """Adds a node of so many outputs."""
        domain, _, name = kind.rpartition("::")
        if domain not in self._versions:
            raise ValueError(f"{kind}: the dialect states no version of the domain '{domain}'")
        node = ir.node(name, list(inputs), attributes, domain=domain, num_outputs=outputs, name=self.unique_name(name))
        for value in node.outputs:
            value.name = self.unique_name("v")
        self._nodes.append(node)
        return tuple(node.outputs)

    def constant(self, value: ArrayLike, dtype: DTypeLike = np.int64) -> ir.Value:
        """A small tensor stored in the graph itself; equal ones are shared."""
        array = np.asarray(value, dtype)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(ir.Tensor(array, name=self.unique_name("c")))
        return self._constants[key]

    def number(self, value: ArrayLike) -> ir.Value:
        """A constant in the type of hidden states."""
        return self.constant(value, self.body_type.numpy())

    @property
    def lowest(self) -> float:
        """The least finite number of that type."""
        return torch.finfo(TORCH_TYPES[self.body_type]).min

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` adds to the graph, added once for all that ask with an equal key."""
        if key not in self._made:
            self._made[key] = make()
        return cast(T, self._made[key])

    def stored(
        self,
        name: str,
        tensor: torch.Tensor,
        dtype: ir.DataType | None = None,
        shape: Sequence[int] | None = None,
    ) -> ir.Value:
        """A tensor in the data file; `dtype` and `shape` where they are not those of the torch tensor."""
        shape = tensor.shape if shape is None else shape
        return self._initializer(self._weights.add(name, tensor, dtype or DTYPES[tensor.dtype], shape))

    def weight(
        self,
        name: str,
        number_format: str,
        tensor: torch.Tensor,
        dtype: ir.DataType | None = None,
        shape: Sequence[int] | None = None,
    ) -> ir.Value:
        """A weight in the data file, with its number format; what belongs to one, such as scales, is only `stored`."""
        return _with_format(self.stored(name, tensor, dtype, shape), number_format)

    def stacked(
        self, name: str, number_format: str, pieces: Iterable[torch.Tensor], dtype: ir.DataType, shape: Sequence[int]
    ) -> ir.Value:
        """A weight whose content comes piece by piece along its first dimensions, such as an expert at a time."""
        return _with_format(self._initializer(self._weights.add_pieces(name, pieces, dtype, shape)), number_format)

    def _initializer(self, tensor: ir.Tensor[NDArray[np.generic]] | ir.ExternalTensor) -> ir.Value:
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
        self._initializers.append(value)
        return value

    def cast(self, value: ir.Value, to: ir.DataType, dtype: ir.DataType | None = None) -> ir.Value:
        """A value in another type; `dtype` is the one it has, where it does not tell itself."""
        return value if (dtype or value.dtype) == to else self.op("Cast", value, to=to)

    def float32(self, value: ir.Value) -> ir.Value:
        """A value of the body's type where arithmetic stays in float32: sums of norms, scans, routers."""
        return self.cast(value, ir.DataType.FLOAT, self.body_type)

    def from_float32(self, value: ir.Value) -> ir.Value:
        return self.cast(value, self.body_type, ir.DataType.FLOAT)

    def shape_of(self, value: ir.Value, axis: int) -> ir.Value:
        """One dimension as an int64 tensor [1]; a constant where it is fixed."""
        size = value.shape[axis] if value.shape is not None else None
        return self.constant([size]) if isinstance(size, int) else self.op("Shape", value, start=axis, end=axis + 1)

    def largest(self, value: ir.Value, axis: int = -1) -> ir.Value:
        """The largest along an axis, counted from the end, which keeps a size of 1.

        onnxruntime's symbolic_shape_infer knows no shape of a ReduceMax, but it takes that of the indices of a
        GatherElements: zeros of the right shape change nothing else. (TopK and ArgMax, which it knows, take 25 times as long.)
        """
        largest = self.op("ReduceMax", value, self.constant([axis]), keepdims=1)
        sizes = [self.op("Shape", value, end=axis), self.constant([1])]
        if axis != -1:
            sizes.append(self.op("Shape", value, start=axis + 1))
        shape = self.op("Concat", *sizes, axis=0)
        zeros = self.op("ConstantOfShape", shape, value=ir.tensor(np.zeros(1, np.int64)))
        return self.op("GatherElements", largest, zeros, axis=axis)

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """0 keeps a dimension, -1 is inferred, as in ONNX."""
        return self.op("Reshape", value, self.constant(shape))

    def finish(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        return ir.Graph(
            inputs,
            outputs,
            nodes=self._nodes,
            initializers=self._initializers,
            opset_imports=dict(self._versions),
            name=name,
        )


def _with_format(value: ir.Value, number_format: str) -> ir.Value:
    assert isinstance(value.const_value, ir.ExternalTensor)
    value.const_value.metadata_props[FORMAT_KEY] = number_format
    return value


def at_edge(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """The value, with which a block ends in this type."""
    node = value.producer()
    assert node is not None, value
    node.metadata_props[EDGE_KEY] = dtype.name
    return value


def with_members(value: ir.Value, names: str) -> ir.Value:
    """A value in the data file that tensors of other names lie in, one after the other along its first dimension."""
    assert isinstance(value.const_value, ir.ExternalTensor)
    value.const_value.metadata_props[MEMBERS_KEY] = names
    return value


def with_width(value: ir.Value, width: int) -> ir.Value:
    """The value, whose last dimension is known from here on."""
    value.meta[WIDTH_KEY] = width
    return value


def width_of(value: ir.Value) -> int:
    """Of what a product or a split gave."""
    return int(value.meta[WIDTH_KEY])


def like(value: ir.Value, other: ir.Value) -> ir.Value:
    """The value, whose type and shape are known to be those of another, where those are known."""
    if other.shape is not None and other.type is not None:
        value.type, value.shape = other.type, ir.Shape(other.shape)
    return value


def fixed_shape(value: ir.Value) -> tuple[Dimension, ...]:
    """The dimensions of an input or a weight, which are known."""
    assert value.shape is not None, value
    return tuple(value.shape)


def sizes_of(value: ir.Value) -> tuple[int, ...]:
    """The same where dynamic dimensions are not looked at; they are 0."""
    return tuple(size if isinstance(size, int) else 0 for size in fixed_shape(value))


def declare(name: str, dtype: ir.DataType, shape: Sequence[Dimension]) -> ir.Value:
    """A typed input (or the declaration of an output); strings name dynamic dimensions."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def rename(value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[Dimension]) -> ir.Value:
    """Makes a node's output a graph output with a name, a type and a shape."""
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value
