"""How many bytes of an engine file are weights, and which ones.

The file (TensorRT-RTX 1.7; nobody documents it) begins with a table of its sections: 4 letters, 4 bytes, offset and size as
uint64. Those of the weights are `WGHT`, of the program `ENGN`, letters backwards.
"""

import mmap
import struct
from pathlib import Path

import onnx_ir as ir

TABLE_BYTES = 4096  # in which the table lies
WEIGHTS = b"THGW"
MOST = 64  # bytes of a row that are looked for
ENTRY = struct.Struct("<4s4xQQ")


def weight_bytes(engine: Path) -> int | None:
    """None where the file is of another kind."""
    with open(engine, "rb") as file:
        head, size = file.read(TABLE_BYTES), engine.stat().st_size
    place = head.find(WEIGHTS)
    if place < 0 or place + ENTRY.size > len(head):
        return None
    _, offset, length = ENTRY.unpack_from(head, place)
    return int(length) if place + ENTRY.size <= offset and offset + length <= size else None


def holds_row(engine: Path, tensor: ir.ExternalTensor) -> bool:
    """Whether an engine has the first row of a tensor as it lies in the graph's data file. Builders lay matrices side by side, so
    that whole ones need not be found; int4 in blocks they order anew."""
    row = tensor.nbytes // max(1, tensor.size // max(1, tensor.shape.numpy()[-1] if tensor.shape else 1))
    with open(tensor.path, "rb") as data:
        data.seek(tensor.offset or 0)
        wanted = data.read(max(1, min(row, MOST)))
    with open(engine, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        return held.find(wanted) >= 0
