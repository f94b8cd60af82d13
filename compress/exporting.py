"""One export of a checkpoint folder: `compress export`, and what `apply` does for each exporter of a recipe."""

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from compress import plugins, progress
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError, WorkError, first_line, nearest
from compress.recipe import override_key
from compress.strict_model import from_flags
from compress.workspace import MANIFEST

PARTIAL = ".partial"


def export_checkpoint(checkpoint: Path, kind: str, out: Path | None, overrides: Iterable[str] = ()) -> Path:
    """Exports to `out`, which must not exist, and returns it. `overrides` are options of the exporter, KEY=VALUE."""
    kinds = plugins.names(plugins.EXPORTERS)
    if kind not in kinds:
        raise InputError(f"--to {kind}: no such exporter{nearest(kind, kinds)}")
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder")
    out = out or _default_folder(checkpoint.resolve(), kind)
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder with -o")
    module = plugins.load(plugins.EXPORTERS, kind)
    options = _options(module, overrides)
    export_to(module, kind, options, Checkpoint(checkpoint, allow_quantized=True), out)
    return out


def _options(module, overrides: Iterable[str]):
    data: dict = {}
    for override in overrides:
        override_key(data, override)
    return from_flags(module.Options, **data)


def _default_folder(checkpoint: Path, kind: str) -> Path:
    """Beside the checkpoint, or beside the finished output it is part of, which stays as its manifest lists it."""
    base = checkpoint.parent if (checkpoint.parent / MANIFEST).is_file() else checkpoint
    return base.with_name(f"{base.name}-{kind}")


def export_to(module, kind: str, options, written: Checkpoint, folder: Path) -> None:
    """Writes an export beside `folder` and renames it when complete; leaves nothing where it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=PARTIAL, dir=folder.parent))
    try:
        _fill_export(module, kind, options, written, partial)
        partial.chmod(0o755)  # mkdtemp makes it private
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill_export(module, kind: str, options, written: Checkpoint, partial: Path) -> None:
    with progress.task(f"exporting {kind}", written.model.parameters) as advance:
        try:
            module.export(written, partial, options, advance)
        except (InputError, WorkError, OSError):
            raise
        except Exception as error:  # onnx, protobuf and the exporters to come fail in ways of their own
            raise WorkError(f"export to {kind} failed: {first_line(error)}") from error
