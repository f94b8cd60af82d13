"""What a builder measured of kernels, kept for the next build. It means something to builders that time them on a GPU."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from compress.disk import cache
from exporters.engines.job import Loaded


@contextlib.contextmanager
def kept(file: Path, builder: Loaded) -> Iterator[None]:
    """The builder's timings are in `file` meanwhile; what it made of them is kept where the build went well."""
    path = cache.folder("timings") / f"{builder['name']}-{builder['version']}"
    with cache.entry(path, lambda entry: None) as entry, open(file, "wb") as copy:
        shutil.copyfileobj(entry, copy)
        copy.truncate(copy.tell() - cache.DIGEST_BYTES)
    before = file.read_bytes()
    yield
    after = file.read_bytes()
    if after != before:
        cache.replace(path, lambda entry: _write(entry, after))


def _write(entry: BinaryIO, data: bytes) -> None:
    entry.write(data)
