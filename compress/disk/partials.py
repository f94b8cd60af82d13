"""Work in progress beside its final name, in a folder `NAME.xxxxxxxx.partial`, whose owner holds the lock in it.

The name is random. What a killed process left goes when its lock is free and nothing in it changed for a day: where
machines share a disk but not its locks, age alone protects what another one writes.
"""

import contextlib
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from compress.disk import locks
from compress.disk.locks import LOCK, Lock, hold

SUFFIX = ".partial"
JOURNAL = "journal.json"  # in the folder of a run that can be resumed, which is no leftover
LEFTOVER_SECONDS = 24 * 60 * 60


def new_name(target: Path) -> Path:
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}{SUFFIX}")


def make(target: Path) -> tuple[Path, Lock]:
    """A new folder beside `target`, its lock held."""
    folder = new_name(target)
    folder.mkdir()
    try:
        lock = hold(folder / LOCK)
        assert lock is not None  # nobody else knows the folder's name
        return folder, lock
    except BaseException:
        remove(folder)
        raise


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A new folder to work in; gone at the end, with whatever was not moved out of it."""
    folder, lock = make(target)
    try:
        yield folder
    finally:
        remove(folder)
        lock.release()


def of(target: Path) -> Iterator[Path]:
    """Folders in which something is, or was, made that is to be called `target`. Others of such names are not ours."""
    name = re.compile(rf"{re.escape(target.name)}\.\w+{re.escape(SUFFIX)}")
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if name.fullmatch(path.name) and path.is_dir() and _is_ours({inside.name for inside in path.iterdir()}):
            yield path


def _is_ours(names: set[str]) -> bool:
    """An export (of earlier versions without a lock), or what had just been made; not a run that can be resumed."""
    return JOURNAL not in names and (not names or LOCK in names or any(name.startswith("model.onnx") for name in names))


def is_held(path: Path) -> bool | None:
    """Whether a process is at work there; None where that cannot be told."""
    return locks.is_held(path / LOCK if path.is_dir() else path)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Those whose process is gone, and has been for long."""
    for path in paths:
        if time.time() - last_change(path) > LEFTOVER_SECONDS and is_held(path) is False:
            remove(path)


def last_change(path: Path) -> float:
    """Of a file, or of anything below a folder, in seconds since 1970; 0 where it has gone meanwhile."""
    changes = [0.0]
    for changed in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            changes.append(changed.lstat().st_mtime)
    return max(changes)


def remove(path: Path) -> None:
    """A file or folder, whether it is still there or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
