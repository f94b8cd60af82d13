"""Standard output and error for a command: neither a reader that went away (`| head`) nor a character that the terminal
cannot show changes how the command ends."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Steady(io.FileIO):
    """A file descriptor that takes everything; what could not be written is remembered, not raised.

    Everything above it (buffers, click, rich, the flush at the end) needs no handling of its own then.
    """

    error: OSError | None = None

    def write(self, data: "ReadableBuffer") -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Makes this process's stdout and stderr steady; streams that others put in their place are left alone."""
    with contextlib.ExitStack() as undo:
        for name in ("stdout", "stderr"):
            _replace(name, undo)
        yield


def reader_is_gone() -> bool:
    """Whether what is written to stdout goes nowhere."""
    return isinstance(_error(), BrokenPipeError)


def what_was_lost() -> str | None:
    """Why standard output could not be written, where someone waits for it: a full disk, say."""
    sys.stdout.flush()
    error = _error()
    return None if error is None or reader_is_gone() else error.strerror


def _replace(name: str, undo: contextlib.ExitStack) -> None:
    stream = getattr(sys, name)
    if stream is None:  # was closed by the caller: the descriptor must not go to a file that is opened later
        setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process
    elif stream is getattr(sys, f"__{name}__"):
        stream.flush()
        raw = _Steady(stream.fileno(), "w", closefd=False)
        replacement = io.TextIOWrapper(
            io.BufferedWriter(raw), stream.encoding, "backslashreplace" if stream.errors == "strict" else stream.errors,
            line_buffering=stream.line_buffering, write_through=stream.write_through,
        )  # fmt: skip
        setattr(sys, name, replacement)
        undo.callback(setattr, sys, name, stream)
        undo.callback(replacement.flush)


def _error() -> OSError | None:
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None)
