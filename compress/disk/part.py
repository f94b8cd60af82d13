"""A stretch of a file, to be read as a file of its own."""

import io
import os
from typing import BinaryIO


def part(file: BinaryIO, offset: int, size: int) -> io.BufferedReader:
    """The bytes from `offset` on; the whole file may be read by others meanwhile."""
    return io.BufferedReader(_Part(file, offset, size))


class _Part(io.RawIOBase):
    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._place = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence])
        return self._place

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]  # of all that has bytes to set
        self._file.seek(self._offset + self._place)
        found = self._file.read(max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)
