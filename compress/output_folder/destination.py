"""Where `-o DIR` leads, and what is refused there before any work."""

import os
import re
from pathlib import Path

from compress.disk.partials import SUFFIX, is_held
from compress.errors import InputError
from compress.output_folder.integrity import is_output

DEEPEST = 64  # characters that the names of files below an output folder add to its own


def resolve(out: Path) -> Path:
    """The folder that is meant: of a symbolic link its target, so that the link stays and leads to the output."""
    is_link = os.path.islink(out)  # noqa: PTH114 - the name may be too long
    return Path(os.path.realpath(out)) if is_link or out.name in ("", "..") else out


def partial_of(out: Path) -> Path:
    """The work folder of `apply`."""
    out = resolve(out)
    return out.parent / (out.name + SUFFIX)


def refuse_existing(out: Path, *, resume: bool, overwrite: bool) -> None:
    """What stands in the way of `apply` to `out` (resolved)."""
    partial = partial_of(out)
    refuse_unusable(out)
    _refuse_unusable_partial(partial)
    refuse_occupied(out, overwrite=overwrite, later_run=resume and os.path.lexists(partial))
    if os.path.lexists(partial) and not (resume or overwrite):
        raise InputError(
            f"{partial}: an earlier run stopped there; continue it with --resume or begin anew with --overwrite"
        )


def refuse_unusable(out: Path) -> None:
    """A place where no folder can be made, or where none can be renamed to."""
    if not out.name or os.path.realpath(out) in map(str, (Path.cwd(), *Path.cwd().parents)):
        raise InputError(f"{out}: the output needs a folder of its own, not one that holds the working folder")
    ancestor = next(path for path in out.absolute().parents if os.path.lexists(path))
    if not ancestor.is_dir():
        raise InputError(f"{out}: {ancestor} is a file, not a folder")
    try:
        os.lstat(out / ("x" * DEEPEST))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise unwritable(out, error) from None
    if is_mount_point(out):
        raise InputError(
            f"{out}: is a mount point, which cannot get the finished output's place; choose a folder in it, such as -o {out / 'out'}"
        )


def unwritable(out: Path, error: OSError) -> InputError:
    return InputError(f"{out}: cannot be written ({error.strerror}); choose another folder with -o")


def being_written(folder: Path) -> InputError:
    return InputError(f"{folder}: is being written by another process; wait for it, or choose another folder with -o")


def _refuse_unusable_partial(partial: Path) -> None:
    if not os.path.lexists(partial):
        return
    if partial.is_symlink() or not partial.is_dir() or is_mount_point(partial):
        raise InputError(
            f"{partial}: is in the way, the work is done in a folder of that name; remove it or choose another folder with -o"
        )
    if is_held(partial):
        raise being_written(partial)


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def refuse_occupied(out: Path, *, overwrite: bool, later_run: bool = False) -> None:
    """Empty folders are replaced, with --overwrite outputs of this tool too, and nothing else. `later_run`: an
    interrupted one is to be continued."""
    if not os.path.lexists(out) or is_empty_folder(out):
        return
    if not is_output(out):
        raise InputError(f"{out}: is not an output of this tool, so it is left alone; choose another folder with -o")
    if overwrite:
        return
    if later_run:
        raise InputError(
            f"{out}: holds a complete output already; --resume --overwrite finishes the later run and replaces it"
        )
    raise InputError(
        f"{out}: holds a complete output already; choose another folder with -o or replace it with --overwrite"
    )


def is_mount_point(path: Path) -> bool:
    """Mounts within one file system show in Linux's own list only."""
    return os.path.ismount(path) or os.path.realpath(path) in _mounts()


def _mounts() -> set[str]:
    """Mount points as /proc/self/mountinfo lists them (proc(5)): the fifth field, some characters in octal."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    return {re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), line.split(" ")[4]) for line in lines}
