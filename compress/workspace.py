"""The output folder: work happens in `DIR.partial`, finished pieces are noted in a journal, and DIR appears when complete."""

import json
import os
import shutil
import threading
from pathlib import Path

from compress.checkpoint.writer import write_json
from compress.errors import InputError

MANIFEST, JOURNAL = "manifest.json", "journal.json"
CALIBRATION = "calibration"  # hidden states, findings and notes for the report; gone when the output is published


class Workspace:
    """`DIR.partial` with its journal. `key` is what must not change between interruption and resume."""

    def __init__(self, out: Path, key: dict, *, resume: bool, overwrite: bool):
        self.out, self.folder = out, partial_of(out)
        if overwrite and not resume and self.folder.exists():
            shutil.rmtree(self.folder)
        self._key, self._done = key, _journal(self.folder, key) if self.folder.exists() else {}
        self._lock = threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save()

    def is_done(self, piece: str) -> bool:
        """Whether a file, or a folder, was finished before: it is noted and its size is what was noted."""
        return piece in self._done and tree_bytes(self.folder / piece) == self._done[piece]

    def mark_done(self, piece: str) -> None:
        size = tree_bytes(self.folder / piece)
        with self._lock:  # shards are published beside the work on the next one
            self._done[piece] = size
            self._save()

    def publish(self) -> None:
        """Renames the finished folder to its final name, replacing a previous one at the last moment."""
        previous = self.out.with_name(f"{self.out.name}.previous-{os.getpid()}")
        if self.out.exists():
            os.replace(self.out, previous)
        os.replace(self.folder, self.out)
        (self.out / JOURNAL).unlink()  # only now: an interruption before the renaming can still be resumed
        shutil.rmtree(self.out / CALIBRATION, ignore_errors=True)  # nor does the report lose its notes
        shutil.rmtree(previous, ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _save(self) -> None:
        write_json(self.folder / JOURNAL, {"key": self._key, "done": self._done})


def partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def refuse_existing(out: Path, *, resume: bool, overwrite: bool) -> None:
    """What stands in the way of writing to `out`, before any work."""
    if not out.name or out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{out}: the output needs a folder of its own, not one that holds the working folder")
    ancestor = next(path for path in out.absolute().parents if path.exists())
    if not ancestor.is_dir():
        raise InputError(f"{out}: {ancestor} is a file, not a folder")
    _refuse_occupied(out, resume=resume, overwrite=overwrite)
    if partial_of(out).exists() and not (resume or overwrite):
        raise InputError(
            f"{partial_of(out)}: an earlier run stopped there; continue it with --resume or begin anew with --overwrite"
        )


def _refuse_occupied(out: Path, *, resume: bool, overwrite: bool) -> None:
    """--overwrite replaces outputs of this tool and empty folders, nothing else."""
    if not out.exists():
        return
    is_output = (out / MANIFEST).is_file()
    if not is_output and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: is not an output of this tool, so it is left alone; choose another folder with -o")
    if overwrite:
        return
    if resume and partial_of(out).exists():
        raise InputError(
            f"{out}: holds a complete output already; --resume --overwrite finishes the later run and replaces it"
        )
    raise InputError(
        f"{out}: holds a complete output already; choose another folder with -o or replace it with --overwrite"
    )


def _journal(folder: Path, key: dict) -> dict[str, int]:
    """What an earlier run finished; refuses to mix two different jobs."""
    try:
        journal = json.loads((folder / JOURNAL).read_text())
        earlier, done = journal["key"], journal["done"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{folder}: no readable {JOURNAL} in it, so it cannot be resumed; begin anew with --overwrite"
        ) from None
    changed = sorted(name for name in key if earlier.get(name) != key[name])
    if changed:
        raise InputError(
            f"{folder}: cannot be resumed, {' and '.join(changed)} changed since; begin anew with --overwrite"
        )
    return done


def tree_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; -1 where there is nothing."""
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else -1
