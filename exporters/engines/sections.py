"""How many bytes of an engine file are weights.

The file (TensorRT-RTX 1.7; nobody documents it) begins with a table of its sections: 4 letters, 4 bytes, offset and size as
uint64. Those of the weights are `WGHT`, of the program `ENGN`, letters backwards.
"""

import struct
from pathlib import Path

TABLE_BYTES = 4096  # in which the table lies
WEIGHTS = b"THGW"
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
