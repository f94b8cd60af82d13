"""One safetensors file: a header that is checked before it is believed, tensors read by position.

Reads are positional (`pread` into a fresh buffer), never mapped: pages of a mapping count as resident memory.
Layout (safetensors format): 8 bytes little-endian header length, a JSON header, then the data it points into.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from compress.disk.pointers import refuse_pointer
from compress.errors import InputError
from compress.strict import json_text
from compress.strict.json_text import Json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SIZE = 1 << 62  # of a dimension or an offset
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: absolute byte offset and length in its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    length: int


class SafetensorsFile:
    """The entries of one file, and positional reads of whole tensors or of blocks of rows."""

    def __init__(self, path: Path):
        self.path = path
        self.entries = _read_header(path)

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor, or its rows `rows.start:rows.stop` (dimension 0), as a fresh CPU tensor of the stored dtype."""
        entry = self.entries[name]
        shape, offset, length = entry.shape, entry.offset, entry.length
        if rows is not None:
            row_bytes = length // shape[0]
            offset, length = offset + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes
            shape = (rows.stop - rows.start, *shape[1:])
        buffer = torch.empty(length, dtype=torch.uint8)
        self._fill(buffer, offset, name)
        return buffer.view(entry.dtype).view(shape)

    def _fill(self, buffer: torch.Tensor, offset: int, name: str) -> None:
        view = buffer.numpy().data
        with open(self.path, "rb", buffering=0) as file:
            while view:
                count = os.preadv(file.fileno(), [view[: 1 << 30]], offset)
                if count == 0:
                    raise InputError(f"{self.path}: file ends inside tensor '{name}' (truncated)")
                view, offset = view[count:], offset + count


def _read_header(path: Path) -> dict[str, Entry]:
    refuse_pointer(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > size - 8:
                raise InputError(
                    f"{path}: its header says {length} bytes but the file has {size} (truncated or not safetensors)"
                )
            if length > MAX_HEADER_BYTES:
                raise InputError(f"{path}: a header of {length} bytes is over the format's limit of {MAX_HEADER_BYTES}")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return _parse_header(path, raw, data_start=8 + length, file_size=size)


def _parse_header(path: Path, raw: bytes, data_start: int, file_size: int) -> dict[str, Entry]:
    try:
        header = json_text.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, data_start) for name, value in header.items()}
    _check_cover(path, entries, data_start, file_size)
    return entries


def _entry(path: Path, name: str, value: Json, data_start: int) -> Entry:
    stated = _stated(value)
    if stated is None:
        raise InputError(
            f"{path}: tensor '{name}' has a malformed header entry; expected dtype, shape and data_offsets"
        )
    dtype, shape, begin, end = stated
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise InputError(
            f"{path}: tensor '{name}' has offsets {begin}..{end}, {end - begin} bytes, but its shape "
            f"{list(shape)} in {DTYPE_NAMES[dtype]} takes {expected}"
        )
    return Entry(name, dtype, shape, data_start + begin, expected)


def _stated(value: Json) -> tuple[torch.dtype, tuple[int, ...], int, int] | None:
    """Type, shape and offsets of a header entry; None where it does not have them."""
    dtype, shape, offsets = (
        map(value.get, ("dtype", "shape", "data_offsets")) if isinstance(value, dict) else (None,) * 3
    )
    if not (isinstance(dtype, str) and dtype in DTYPES and isinstance(shape, list) and isinstance(offsets, list)):
        return None
    sizes = [size for size in (*shape, *offsets) if type(size) is int and 0 <= size <= MAX_SIZE]
    if len(offsets) != 2 or len(sizes) != len(shape) + 2:
        return None
    return DTYPES[dtype], tuple(sizes[:-2]), sizes[-2], sizes[-1]


def _check_cover(path: Path, entries: dict[str, Entry], data_start: int, file_size: int) -> None:
    """The tensors must lie end to end and fill the file exactly: no overlap, no gap, nothing beyond the end."""
    position = data_start
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.length)):
        if entry.offset < position:
            raise InputError(f"{path}: tensor '{entry.name}' overlaps another one in the file")
        if entry.offset > position:
            raise InputError(f"{path}: {entry.offset - position} unexplained bytes before tensor '{entry.name}'")
        position = entry.offset + entry.length
    if position > file_size:
        raise InputError(f"{path}: truncated, its tensors need {position} bytes and the file has {file_size}")
    if position < file_size:
        raise InputError(f"{path}: {file_size - position} unexplained bytes after the last tensor")
