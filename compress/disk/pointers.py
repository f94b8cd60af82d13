"""git-lfs pointers: what a clone without git-lfs leaves in place of large files."""

from pathlib import Path

from compress.errors import InputError

BEGINNING = b"version https://git-lfs.github.com/spec/"
MOST_BYTES = 1024  # the specification's limit


def refuse_pointer(path: Path) -> None:
    """Raises InputError where the file holds a pointer; one that is missing or cannot be read is for its reader to refuse."""
    try:
        if path.stat().st_size > MOST_BYTES:
            return
        with open(path, "rb") as file:
            is_pointer = file.read(len(BEGINNING)) == BEGINNING
    except OSError:
        return
    if is_pointer:
        raise InputError(f"{path}: a git-lfs pointer, not the file itself; fetch it with 'git lfs pull'")
