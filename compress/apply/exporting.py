"""One export of a checkpoint folder: `compress export`, and what `apply` does for each exporter of a recipe."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from compress import plugins
from compress.apply import ranging, stages
from compress.checkpoint.reader import Checkpoint, find_checkpoint
from compress.disk import files, partials
from compress.errors import InputError, WorkError, first_line, nearest
from compress.output_folder import destination, integrity
from compress.plugins import Exported, Exporter
from compress.recipe.calibration import Calibration
from compress.recipe.recipe import override_key
from compress.strict.json_text import Json
from compress.strict.models import Strict, from_flags
from compress.terminal import progress

CONTENT = "export"  # in the folder that is worked in: what gets the final name


class Written(NamedTuple):
    """An export under its final name."""

    folder: Path
    exported: Exported


def export_checkpoint(checkpoint: Path, kind: str, out: Path | None, overrides: Iterable[str] = ()) -> Path:
    """Exports to `out`, which must not exist, and returns it. `overrides` are options of the exporter, KEY=VALUE."""
    return export_and_describe(checkpoint, kind, out, overrides).folder


def export_and_describe(checkpoint: Path, kind: str, out: Path | None, overrides: Iterable[str] = ()) -> Written:
    """The same, with what was written."""
    kinds = plugins.names(plugins.EXPORTERS)
    if kind not in kinds:
        raise InputError(f"--to {kind}: no such exporter{nearest(kind, kinds)}")
    checkpoint = find_checkpoint(checkpoint)
    out = out or _default_folder(checkpoint.resolve(), kind)
    folder = destination.resolve(out)
    _refuse_existing(folder)
    integrity.verify(checkpoint)
    exporter = _with_options(plugins.load_exporter(kind), overrides)
    opened = Checkpoint(checkpoint, allow_quantized=True)
    exporter.refuse(opened.model)
    if exporter.needs_ranges:
        ranging.refuse_without_text(exporter, kind, checkpoint, Calibration())
        exporter = exporter.fitted(opened, ranging.on_shipped_text(opened))
    export_to(exporter, kind, opened, folder)
    return Written(out, exporter.describe(folder))


def _with_options(exporter: type[Exporter[Strict]], overrides: Iterable[str]) -> Exporter[Strict]:
    data: dict[str, Json] = {}
    for override in overrides:
        override_key(data, override, example="layout=genai")
    return exporter(from_flags(exporter.Options, **data))


def _default_folder(checkpoint: Path, kind: str) -> Path:
    """Beside the checkpoint, or beside the finished output it is part of, which stays as its manifest lists it."""
    base = checkpoint.parent if integrity.is_output(checkpoint.parent) else checkpoint
    return base.with_name(f"{base.name}-{kind}")


def _refuse_existing(folder: Path) -> None:
    destination.refuse_unusable(folder)
    if os.path.lexists(folder):
        raise InputError(f"{folder}: exists already; choose another folder with -o")
    for partial in partials.of(folder):
        if (partial / CONTENT).is_dir() and partials.is_held(partial):
            raise destination.being_written(folder)


def export_to(exporter: Exporter[Strict], kind: str, written: Checkpoint, folder: Path) -> None:
    """Writes an export beside `folder`, which is not there or empty, and renames it when it is complete and on disk;
    leaves nothing where it fails."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partials.remove_leftovers(partials.of(folder))
        partial, lock = partials.make(folder)
    except OSError as error:
        raise destination.unwritable(folder, error) from None
    try:
        content = partial / CONTENT
        content.mkdir()
        with files.writing(folder):
            _fill_export(exporter, kind, written, content)
            files.sync_tree(content)
        _publish(content, folder)
    finally:
        partials.remove(partial)
        lock.release()


def remove_unfinished(folder: Path) -> None:
    """What killed exports left of `folder`, where nobody else can be at work."""
    for path in (folder, *partials.of(folder)):
        partials.remove(path)


def _publish(content: Path, folder: Path) -> None:
    try:
        files.rename(content, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise InputError(f"{folder}: another process wrote it meanwhile, so it is left alone") from None


def _fill_export(exporter: Exporter[Strict], kind: str, written: Checkpoint, partial: Path) -> None:
    with progress.task(stages.exporting(kind), written.model.parameters) as advance:
        try:
            exporter.export(written, partial, advance)
        except (InputError, WorkError, OSError):
            raise
        except Exception as error:  # onnx, protobuf and the exporters to come fail in ways of their own
            raise WorkError(f"export to {kind} failed: {first_line(error)}") from error
