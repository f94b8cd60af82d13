"""The weights of a model.onnx, read back as they lie in its data file: the inverse of `stored.py` and `table.py`.

A matrix lies transposed, the embedding as it is, the taps of a convolution and what a Mamba-1 state decays by transposed too. One
tensor is in memory at a time.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from compress import formats
from compress.checkpoint.safetensors_file import DTYPE_NAMES
from compress.errors import InputError
from compress.formats.base import NumberFormat, Quantized
from compress.model.architecture import Architecture
from compress.model.hybrid import HybridModel
from compress.model.records import Rotated
from compress.model.roles import Role
from compress.model.tensor_names import written_out
from compress.model.weight import PLAIN_DTYPES, Spec, Stored, Unit, Weight
from compress.strict.json_text import JsonObject
from exporters.graph.builder import FORMAT_KEY, TORCH_TYPES
from exporters.graph.members import members
from exporters.graph.rounding import OFFSET
from exporters.graph.stored import SCALE

ALONG = ("Cast", "Gather", "Transpose", "Reshape", "Unsqueeze")  # what moves scales before they are widened


def model(graph: ir.Model, architecture: Architecture, config: JsonObject, path: Path) -> HybridModel:
    """The units of a graph; a tensor that the configuration implies and the data file lacks is left out."""
    lying = _Lying(graph, architecture, path)
    units = (
        Unit(unit.name, {spec.name: lying.weight(spec) for spec in unit.specs if lying.has(spec.name)})
        for unit in architecture.layout()
    )
    return HybridModel(architecture, tuple(units), config)


class _Lying:
    """Tensors of a graph's data file. The last one read is kept, for its blocks of rows."""

    def __init__(self, graph: ir.Model, architecture: Architecture, path: Path):
        self._path, self._table = path, architecture.EMBEDDING
        self._values = {
            value.name: value
            for part in graph.graphs()
            for value in part.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        self._tensors = {
            member.name: member for tensor in map(_stored, self._values.values()) for member in members(tensor)
        }
        self._rotations = {
            name: change.block
            for record in architecture.config.compress.passes
            for change in record.changes or ()
            if isinstance(change, Rotated)
            for name in written_out(change.tensors)
        }
        self._last: tuple[str, Stored] | None = None

    def has(self, name: str) -> bool:
        return name in self._tensors and FORMAT_KEY in self._tensors[name].metadata_props

    def weight(self, spec: Spec) -> Weight:
        number_format = self._tensors[spec.name].metadata_props[FORMAT_KEY]
        if number_format not in PLAIN_DTYPES and not (number_format in formats.FILES and len(spec.shape) == 2):
            raise InputError(f"{self._path}: tensor '{spec.name}' is said to be {number_format}, which it cannot be")

        def load(rows: slice | None = None) -> Stored:
            if self._last is None or self._last[0] != spec.name:
                self._last = spec.name, self._whole(spec, number_format)
            return _rows(self._last[1], rows)

        found = Weight(spec.name, spec.role, spec.shape, number_format, load, rotation=self._rotations.get(spec.name))
        return replace(found, scale_dtype=self._scale_dtype(spec.name))

    def _scale_dtype(self, name: str) -> torch.dtype | None:
        """Where each is a number of its own; steps in a byte are exact."""
        scales = self._tensors.get(name + SCALE)
        return None if scales is None or scales.dtype == ir.DataType.UINT8 else TORCH_TYPES.get(scales.dtype)

    def _whole(self, spec: Spec, number_format: str) -> Stored:
        tensor, is_table = self._tensors[spec.name], spec.name == self._table
        if number_format in PLAIN_DTYPES:
            return self._shaped(spec, _plain(spec, self._read(tensor), is_table), PLAIN_DTYPES[number_format])
        known = formats.get(number_format)
        values = self._shaped(spec, _values(self._read(tensor), tensor.dtype, spec.shape, known, is_table), None)
        return Quantized(values, self._scales(spec, known, is_table), number_format)

    def _shaped(self, spec: Spec, found: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        if found.shape != spec.shape or dtype not in (None, found.dtype):
            raise InputError(
                f"{self._path}: tensor '{spec.name}' is {DTYPE_NAMES.get(found.dtype, str(found.dtype))} {list(found.shape)}, "
                f"expected shape {list(spec.shape)} as its configuration implies"
            )
        return found

    def _scales(self, spec: Spec, number_format: NumberFormat, is_table: bool) -> torch.Tensor:
        name = spec.name + SCALE
        if name not in self._tensors:
            raise InputError(f"{self._path}: tensor '{spec.name}' has no scales ('{name}' is missing)")
        scales = self._read(self._tensors[name]).to(torch.float32)
        if self._tensors[name].dtype == ir.DataType.UINT8:
            scales = scales * self._step(name)
        shape = number_format.scales_shape(spec.shape)
        if scales.numel() != shape[0] * shape[1]:
            raise InputError(f"{self._path}: '{name}' has {scales.numel()} scales, expected {shape[0]} x {shape[1]}")
        return scales.reshape(shape) if is_table or min(shape) == 1 else scales.reshape(shape[::-1]).T.contiguous()

    def _step(self, name: str) -> float:
        """What the graph multiplies scales that lie in a byte with."""
        for value in _moved(self._values[name]):
            for node, _ in value.uses():
                factor = next((known for known in node.inputs if known is not value and known is not None), None)
                if node.op_type == "Mul" and factor is not None and factor.const_value is not None:
                    return float(factor.const_value.numpy().reshape(-1)[0])
        raise InputError(f"{self._path}: nothing in the graph says what the scales '{name}' are multiples of")

    def _read(self, tensor: ir.ExternalTensor) -> torch.Tensor:
        """As it lies; int4 as bytes, two values each, flat."""
        try:
            raw = np.fromfile(tensor.path, np.uint8, tensor.nbytes, offset=tensor.offset or 0)
        except OSError as error:
            raise InputError(f"{tensor.path}: cannot be read ({error.strerror})") from None
        if len(raw) != tensor.nbytes:
            raise InputError(f"{tensor.path}: ends within tensor '{tensor.name}'")
        found = torch.from_numpy(raw)
        if tensor.dtype == ir.DataType.INT4:
            return found
        if tensor.dtype not in TORCH_TYPES:
            raise InputError(f"{self._path}: tensor '{tensor.name}' is {tensor.dtype.name}, which no export writes")
        return found.view(TORCH_TYPES[tensor.dtype]).view(tensor.shape.numpy())


def _stored(value: ir.Value) -> ir.ExternalTensor:
    assert isinstance(value.const_value, ir.ExternalTensor), value.name
    return value.const_value


def _moved(value: ir.Value) -> Iterator[ir.Value]:
    """A value, and what it is under another order or type."""
    yield value
    for node, _ in value.uses():
        if node.op_type in ALONG and node.inputs[0] is value:
            yield from _moved(node.outputs[0])


def _plain(spec: Spec, lying: torch.Tensor, is_table: bool) -> torch.Tensor:
    if spec.role == Role.SSM_CONV and len(spec.shape) == 3:
        return lying.T[:, None]
    return lying.T if len(spec.shape) == 2 and spec.role != Role.STATE_SCALE and not is_table else lying


def _values(
    lying: torch.Tensor, dtype: ir.DataType, shape: tuple[int, ...], number_format: NumberFormat, is_table: bool
) -> torch.Tensor:
    """[N, K] on the format's grid."""
    rows, columns = shape
    if number_format.name.startswith("int4"):
        flat = torch.stack([lying.flatten() & 15, lying.flatten() >> 4], -1).flatten()[: rows * columns].to(torch.int8)
        signed = flat - 8 if dtype == ir.DataType.UINT8 else torch.where(flat > 7, flat - 16, flat)
        return signed.view(shape) if is_table else signed.view(columns, rows).T.contiguous()
    if is_table:
        return lying.view(torch.float8_e4m3fn) if number_format.name.startswith("fp8") else lying
    if dtype == ir.DataType.UINT8:
        lying = (lying.to(torch.int16) - OFFSET).to(torch.int8)
    return lying.T.contiguous()


def _rows(stored: Stored, rows: slice | None) -> Stored:
    if rows is None:
        return stored
    if not isinstance(stored, Quantized):
        return stored[rows]
    known = formats.get(stored.format)
    return Quantized(stored.values[rows], known.scales_of(stored.scales, rows), stored.format)
