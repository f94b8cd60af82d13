"""A matrix as an image of one dot for each value: where cells would be too many."""

import base64
import struct
import zlib
from collections.abc import Sequence

from compress.report.html import heat


def of(shares: Sequence[Sequence[float]], stops: Sequence[str]) -> str:
    """The address, with the image in it, of values from 0 to 1 (PNG, three bytes a dot)."""
    rows = (b"\0" + b"".join(bytes(heat.between(stops, share)) for share in row) for row in shares)
    header = struct.pack(">IIBBBBB", len(shares[0]), len(shares), 8, 2, 0, 0, 0)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(b"".join(rows), 9)), _chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
