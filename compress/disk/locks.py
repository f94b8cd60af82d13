"""Locks that die with their process. Only they tell the living from the dead: a process id means nothing in another
container or on another host.

They are advisory (`flock`), on a file of their own. Some shared file systems keep them per machine, and a few know none.
"""

import errno
import fcntl
import os
import time
from dataclasses import dataclass
from pathlib import Path

LOCK = ".lock"  # in a folder that one process works in
UNKNOWN_HERE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
PATIENCE, PAUSE = 5, 0.02  # tries and seconds: whoever only asks (`is_held`) is in the way for a moment


@dataclass(frozen=True)
class Lock:
    """A held lock. `is_certain` is false where the file system has no locks: then nobody else is kept out."""

    descriptor: int
    is_certain: bool = True

    def release(self) -> None:
        os.close(self.descriptor)


def hold(path: Path) -> Lock | None:
    """Takes the lock on a file, which is made where it is missing; None where another process holds it.

    Raises OSError where the file cannot be made, such as FileNotFoundError where its folder has gone.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            taken = _try_patiently(descriptor)
        except OSError as error:
            if error.errno in UNKNOWN_HERE:
                return Lock(descriptor, is_certain=False)
            os.close(descriptor)
            raise
        if taken and _is_still(path, descriptor):
            return Lock(descriptor)
        os.close(descriptor)
        if not taken:
            return None  # else it was removed, or got another name, since it was opened: begin again


def is_held(path: Path) -> bool | None:
    """Whether a process holds the lock on a file, which may be missing; None where that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _try_patiently(descriptor: int) -> bool:
    for left in reversed(range(PATIENCE)):
        if _try(descriptor, fcntl.LOCK_EX):
            return True
        if left:
            time.sleep(PAUSE)
    return False


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
