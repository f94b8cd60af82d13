"""Results kept between runs: `$COMPRESS_CACHE`, else `~/.cache/compress`. Deleting the folder is always safe."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from compress.errors import InputError

NEWEST_KEPT = 8  # entries of one kind; older ones are removed when a new one is published


def location(kind: str) -> Path:
    """Where entries of one kind go; the folder need not exist yet."""
    base = os.environ.get("COMPRESS_CACHE")
    return (
        Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"
    ) / kind


def folder(kind: str) -> Path:
    """The folder for entries of one kind, made where it is missing."""
    path = location(kind)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be used as the cache ({error.strerror}); set COMPRESS_CACHE to a writable folder"
        ) from None
    return path


@contextlib.contextmanager
def publish(path: Path) -> Iterator[Path]:
    """A name to write under (file or folder); renamed to `path` when the block ends well, removed when it does not."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _remove(path)
        os.replace(partial, path)
    finally:
        _remove(partial)
        _remove_leftovers(path.parent)
    entries = sorted((p for p in path.parent.iterdir() if p.suffix != ".partial"), key=_last_used)
    for old in entries[:-NEWEST_KEPT]:
        _remove(old)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process removed it meanwhile
        return 0.0


def _remove_leftovers(folder: Path) -> None:
    """What killed processes left: the number in `NAME.PID.partial` is the process that was writing it."""
    for path in folder.glob("*.partial"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """A folder for intermediate data, removed at the end."""
    path = folder("scratch") / f"{kind}.{os.getpid()}.partial"
    _remove_leftovers(path.parent)
    _remove(path)
    path.mkdir()
    try:
        yield path
    finally:
        _remove(path)


def refuse_full_disk(need: int, what: str) -> None:
    """Says before the work that so many bytes of intermediate data would not fit."""
    path = folder("scratch")
    free = shutil.disk_usage(path).free
    if need > free:
        raise InputError(
            f"{path}: {need / 2**20:,.0f} MiB are needed for {what}, {free / 2**20:,.0f} MiB are free; use fewer --samples"
        )
