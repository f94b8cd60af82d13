"""The work folder `DIR.partial` as one process's own, from before anything is planned until it is published."""

import contextlib
import os
from pathlib import Path

from compress.disk import partials
from compress.disk.locks import LOCK, Lock, hold
from compress.errors import InputError
from compress.output_folder import destination
from compress.terminal import progress

PREVIOUS = ".previous"  # in the work folder: the output it replaces, while the two change places


class Claim:
    """A work folder whose lock is held. `made` are the folders that came into being with it, the deepest first."""

    def __init__(self, folder: Path, lock: Lock, *, is_new: bool, made: list[Path], lock_is_new: bool):
        self.folder, self.is_new = folder, is_new
        self._lock, self._made, self._lock_is_new = lock, made, lock_is_new

    @property
    def is_certain(self) -> bool:
        return self._lock.is_certain

    def give_back(self) -> None:
        """Leaves everything as it was before: nothing has been written."""
        if self.is_new:
            self.remove()
        elif self._lock_is_new:
            (self.folder / LOCK).unlink(missing_ok=True)

    def remove(self) -> None:
        """The folder goes at once, under another name first: nobody finds half of it."""
        going = partials.new_name(self.folder.with_name(self.folder.name.removesuffix(partials.SUFFIX)))
        os.replace(self.folder, going)
        (going / partials.JOURNAL).unlink(missing_ok=True)  # nobody resumes it
        partials.remove(going)
        _remove_empty(self._made)

    def release(self) -> None:
        self._lock.release()


def claim(out: Path, *, resume: bool, overwrite: bool) -> Claim:
    """Takes the work folder of `out` (resolved), or refuses: another process is at work, or something is in the way."""
    while True:
        destination.refuse_existing(out, resume=resume, overwrite=overwrite)
        found = _make(out) or _take(destination.partial_of(out))
        if found is not None:
            break
    try:
        bring_back(found.folder / PREVIOUS, out)
        destination.refuse_occupied(out, overwrite=overwrite, later_run=resume and not found.is_new)
    except BaseException:
        found.give_back()
        found.release()
        raise
    if not found.is_certain:
        progress.warn(f"{found.folder}: this file system has no locks; let no other run write there")
    return found


def _make(out: Path) -> Claim | None:
    """A new work folder, locked before it has its name; None where there is one by then."""
    folder = destination.partial_of(out)
    if os.path.lexists(folder):
        return None
    made = [path for path in folder.parents if not os.path.lexists(path)]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partials.remove_leftovers(partials.of(out))
        new, lock = partials.make(out)
    except OSError as error:
        _remove_empty(made)
        raise destination.unwritable(out, error) from None
    try:
        keep_mode(out, new)
        os.replace(new, folder)
    except OSError as error:
        partials.remove(new)
        lock.release()
        if os.path.lexists(folder):
            return None
        _remove_empty(made)
        raise destination.unwritable(out, error) from None
    return Claim(folder, lock, is_new=True, made=made, lock_is_new=True)


def _take(folder: Path) -> Claim | None:
    """The work folder of an earlier run; None where it was published, or removed, meanwhile."""
    lock_is_new = not (folder / LOCK).exists()
    try:
        lock = hold(folder / LOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    if lock is None:
        raise destination.being_written(folder)
    return Claim(folder, lock, is_new=False, made=[], lock_is_new=lock_is_new)


def bring_back(previous: Path, out: Path) -> None:
    """An output that was to be replaced by a run that was killed at that moment."""
    if previous.exists() and not os.path.lexists(out):
        os.replace(previous, out)


def keep_mode(out: Path, folder: Path) -> None:
    """Whoever may not look into the folder that is replaced may not look into what replaces it."""
    if out.is_dir():
        folder.chmod(0o700 | out.stat().st_mode & 0o7777)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # something else came into it
            folder.rmdir()
