"""Results kept between runs: `$COMPRESS_CACHE`, else `~/.cache/compress`. Deleting the folder is always safe.

Any number of processes, containers and hosts may share it. An entry ends with a digest of its name and its bytes: what
was cut short, damaged or copied from another entry does not agree with it, and is made again.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import BinaryIO, Protocol

from compress.disk import files, partials
from compress.errors import InputError

NEWEST_KEPT = 8  # entries of one kind; older ones are removed when a new one is published
DIGEST_BYTES = hashlib.sha256().digest_size
BLOCK_BYTES = 1 << 20
Opened = BufferedReader | BufferedRandom


class Carried(Protocol):
    """Entries from elsewhere, by `KIND/NAME`."""

    def has(self, name: str) -> bool: ...

    def entry(self, name: str) -> BufferedReader:
        """One that is there, open; raises InputError where it is damaged."""


def location(kind: str) -> Path:
    """Where entries of one kind go; the folder need not exist yet."""
    base = os.environ.get("COMPRESS_CACHE")
    if base:
        return Path(base) / kind
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise InputError(
            "the cache has no place, since this user has no home folder; set COMPRESS_CACHE to one"
        ) from None
    return home / "compress" / kind


def folder(kind: str) -> Path:
    """The folder for entries of one kind, made where it is missing; refused where nothing can be written to it."""
    path = location(kind)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be used as the cache ({error.strerror}); set COMPRESS_CACHE to a writable folder"
        ) from None
    return path


def entry(path: Path, write: Callable[[BinaryIO], None]) -> Opened:
    """An entry, open for reading from its first byte: as it is kept, or as `write` makes it now.

    It stays readable when another process removes or replaces it.
    """
    name = f"{path.parent.name}/{path.name}"
    is_carried = _carried is not None and _carried.has(name)
    file = _carried.entry(name) if _carried and is_carried else _verified(path) or _made(path, write)
    if _noted is not None:
        _noted[name] = os.fdopen(os.dup(file.fileno()), "rb")
    file.seek(0)
    return file


def replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Makes an entry anew, whatever is kept under its name."""
    _made(path, write).close()


def is_there(path: Path) -> bool:
    """Whether `entry` need not make it, as far as its name tells."""
    return path.is_file() or (_carried is not None and _carried.has(f"{path.parent.name}/{path.name}"))


@contextlib.contextmanager
def carrying(carried: Carried) -> Iterator[None]:
    """Entries come from there, where they are there."""
    global _carried
    _carried = carried
    try:
        yield
    finally:
        _carried = None


@contextlib.contextmanager
def noting() -> Iterator[dict[str, BinaryIO]]:
    """Whatever entries are asked for meanwhile, open, by `KIND/NAME`; they share their place with who reads them."""
    global _noted
    noted: dict[str, BinaryIO] = {}
    _noted = noted
    try:
        yield noted
    finally:
        _noted = None
        for file in noted.values():
            file.close()


_carried: Carried | None = None
_noted: dict[str, BinaryIO] | None = None


def _made(path: Path, write: Callable[[BinaryIO], None]) -> Opened:
    with publish(path) as partial, contextlib.ExitStack() as closing:
        file = closing.enter_context(open(partial, "w+b"))
        write(file)
        _seal(file, path.name)
        closing.pop_all()  # the caller reads from it
    return file


def _verified(path: Path) -> Opened | None:
    """The entry, open, where its digest agrees."""
    if not path.is_file():  # opening a named pipe would wait for ever
        return None
    with contextlib.suppress(OSError), contextlib.ExitStack() as closing:
        file = closing.enter_context(open(path, "rb"))
        if agrees(file, path.name, os.fstat(file.fileno()).st_size):
            with contextlib.suppress(OSError):  # another user's: it only counts as older than it is
                os.utime(file.fileno())
            closing.pop_all()  # the caller reads from it
            return file
    return None


def agrees(file: Opened, name: str, size: int) -> bool:
    """Whether an entry of so many bytes ends with the digest of its name and of what it holds."""
    return size >= DIGEST_BYTES and _digest(file, name, size - DIGEST_BYTES) == file.read(DIGEST_BYTES)


def _seal(file: Opened, name: str) -> None:
    digest = _digest(file, name, file.seek(0, os.SEEK_END))
    file.write(digest)
    file.flush()


def _digest(file: Opened, name: str, size: int) -> bytes:
    """Of an entry's name and its first `size` bytes, which are read in blocks; what follows them is read next."""
    found, buffer = hashlib.sha256(name.encode() + b"\0"), memoryview(bytearray(BLOCK_BYTES))
    file.seek(0)
    while size and (count := file.readinto(buffer[: min(size, BLOCK_BYTES)])):
        found.update(buffer[:count])
        size -= count
    return found.digest()


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A name to write a file under; it is flushed and renamed to `path` when the block ends well, else removed."""
    _remove_leftovers(path.parent)
    with files.writing(path), partials.beside(path) as room:
        partial = room / path.name
        yield partial
        files.sync(partial)
        if path.is_dir():
            partials.remove(path)
        files.rename(partial, path)
    kept = [p for p in path.parent.iterdir() if p.suffix != partials.SUFFIX]
    for old in sorted(kept, key=_last_used)[:-NEWEST_KEPT]:
        partials.remove(old)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process removed it meanwhile
        return 0.0


@contextlib.contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """A folder for intermediate data, removed at the end."""
    target = folder("scratch") / kind
    _remove_leftovers(target.parent)
    with files.writing(target.parent), partials.beside(target) as path:
        yield path


def _remove_leftovers(folder: Path) -> None:
    partials.remove_leftovers(folder.glob(f"*{partials.SUFFIX}"))


def refuse_full_disk(need: int, what: str) -> None:
    """Says before the work that so many bytes of intermediate data would not fit."""
    path = folder("scratch")
    free = shutil.disk_usage(path).free
    if need > free:
        raise InputError(
            f"{path}: {need / 2**20:,.0f} MiB are needed for {what}, {free / 2**20:,.0f} MiB are free; use fewer --samples"
        )
