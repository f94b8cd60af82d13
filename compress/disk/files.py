"""Files that are whole after a loss of power, or absent, and errors of a full disk that say where."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_FOR_FOLDERS = {errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}  # what file systems say that cannot flush a folder


def sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NOT_FOR_FOLDERS):
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Everything below a folder, and the folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def rename(source: Path, target: Path) -> None:
    """Gives a flushed file or folder its final name, for good: the name itself is on disk when this returns."""
    os.replace(source, target)
    sync(target.parent)


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; -1 where there is nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else -1


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(path: Path) -> str:
    """Of a file, or of the names and digests of all files below a folder."""
    if path.is_file():
        return file_sha256(path)
    listing = (f"{file_sha256(p)}  {p.relative_to(path)}\n" for p in sorted(path.rglob("*")) if p.is_file())
    return hashlib.sha256("".join(listing).encode(errors="surrogateescape")).hexdigest()


def locate(error: BaseException | None, path: Path) -> None:
    """Tells an error of a full disk where that was: a write does not know its file's name."""
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
        error.filename = str(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What is written meanwhile goes to `path`: a full disk is reported with that name."""
    try:
        yield
    except OSError as error:
        locate(error, path)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames: a reader never sees half a file."""
    partial = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            with open(partial, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            rename(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # it may stand in a user's own folder
        raise
