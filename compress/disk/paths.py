"""Names of files that are not UTF-8: how they are shown, and how libraries that take text can still open them."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def as_text(name: str) -> str:
    """The name as text that can be written anywhere: bytes that are no UTF-8 as `\\xNN`."""
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:  # half a surrogate pair, which no file is called
        raw = name.encode("utf-8", "backslashreplace")
    return raw.decode("utf-8", "backslashreplace")


def is_text(path: Path) -> bool:
    return as_text(str(path)) == str(path)


@contextlib.contextmanager
def with_text_name(folder: Path) -> Iterator[Path]:
    """The folder, under a name that is text: through a link, for as long as the block runs, where its own is not."""
    if is_text(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / "folder"
        link.symlink_to(folder.absolute())
        yield link
