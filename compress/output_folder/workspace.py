"""The output folder: work happens in `DIR.partial`, finished pieces are noted in a journal, and DIR appears when complete."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from compress.disk import files, partials
from compress.disk.json_files import write_json
from compress.disk.locks import LOCK
from compress.disk.partials import JOURNAL
from compress.errors import InputError
from compress.output_folder import destination
from compress.output_folder.claim import PREVIOUS, bring_back, claim, keep_mode
from compress.strict.json_text import JsonObject

NOTHING = (LOCK, f"{JOURNAL}.tmp")  # in a work folder, as it was left by a run that came no further than its journal
CALIBRATION = "calibration"  # hidden states, findings and notes for the report; gone when the output is published


class Noted(TypedDict):
    """What the journal says of a finished piece."""

    bytes: int
    sha256: str


class Workspace:
    """`DIR.partial` with its journal, locked while the context lasts.

    Where the context ends before `begin`, everything is as it was; after that the folder stays, to be resumed.
    """

    def __init__(self, out: Path, *, resume: bool, overwrite: bool):
        self.out = destination.resolve(out)
        self.folder = destination.partial_of(out)
        self._resume, self._overwrite = resume, overwrite
        self._key: JsonObject = {}
        self._done: dict[str, Noted] = {}
        self._saving, self._begun = threading.Lock(), False
        self.is_resumed = False  # whether it goes on from an earlier run's journal; known once it has begun

    def __enter__(self) -> "Workspace":
        self._claim = claim(self.out, resume=self._resume, overwrite=self._overwrite)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            files.locate(error, self.folder)
            if not self._begun:
                self._claim.give_back()
        finally:
            self._claim.release()

    def begin(self, key: JsonObject) -> None:
        """Empties the folder, or goes on from its journal. `key` is what must not change between the two runs."""
        anew = self._overwrite and not self._resume
        found = [path for path in self.folder.iterdir() if path.name not in NOTHING]
        if found and not anew:
            self._done, self.is_resumed = _journal(self.folder, key), True
        self._key, self._begun = key, True
        for path in found if anew else ():
            partials.remove(path)
        self._save()

    def is_done(self, piece: str) -> bool:
        """Whether a file, or a folder, was finished before, and has the bytes that were noted then."""
        noted, path = self._done.get(piece), self.folder / piece
        return noted is not None and files.size(path) == noted["bytes"] and files.sha256(path) == noted["sha256"]

    def mark_done(self, piece: str) -> None:
        path = self.folder / piece
        noted: Noted = {"bytes": files.size(path), "sha256": files.sha256(path)}
        with self._saving:  # shards are published beside the work on the next one
            self._done[piece] = noted
            self._save()

    def forget(self, pieces: list[str]) -> None:
        """What was made from pieces that are made again."""
        for piece in pieces:
            self._done.pop(piece, None)
        self._save()

    def publish(self) -> None:
        """Renames the finished folder to its final name, replacing a previous one at the last moment."""
        destination.refuse_occupied(self.out, overwrite=self._overwrite, later_run=True)
        keep_mode(self.out, self.folder)
        with _made_way(self.out, self.folder / PREVIOUS):
            files.rename(self.folder, self.out)
        for name in (JOURNAL, LOCK, CALIBRATION, PREVIOUS):  # only now: until the renaming the run can be resumed
            partials.remove(self.out / name)
        files.sync(self.out)

    def discard(self) -> None:
        self._claim.remove()

    def _save(self) -> None:
        write_json(self.folder / JOURNAL, {"key": self._key, "done": self._done})


@contextlib.contextmanager
def _made_way(out: Path, previous: Path) -> Iterator[None]:
    """The output that is replaced steps aside, and comes back where nothing took its place."""
    if out.exists() and not destination.is_empty_folder(out):
        partials.remove(previous)  # one that stepped aside for a run that was killed; another has its place by now
        files.rename(out, previous)
    try:
        yield
    finally:
        bring_back(previous, out)


def _journal(folder: Path, key: JsonObject) -> dict[str, Noted]:
    """What an earlier run finished; refuses to mix two different jobs."""
    try:
        journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        earlier, done = dict(journal["key"]), dict(journal["done"])
        if not all(isinstance(noted["bytes"], int) and isinstance(noted["sha256"], str) for noted in done.values()):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{folder}: no readable {JOURNAL} in it, so it cannot be resumed; begin anew with --overwrite"
        ) from None
    changed = sorted(name for name in key if earlier.get(name) != key[name])
    if changed:
        raise InputError(
            f"{folder}: cannot be resumed, {' and '.join(changed)} changed since; begin anew with --overwrite"
        )
    return done
