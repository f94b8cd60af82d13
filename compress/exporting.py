"""`compress export`: one export of a checkpoint folder."""

from pathlib import Path

from compress import pipeline, plugins
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError, nearest
from compress.workspace import MANIFEST


def export_checkpoint(checkpoint: Path, kind: str, out: Path | None) -> Path:
    """Exports to `out`, which must not exist, and returns it."""
    kinds = plugins.names(plugins.EXPORTERS)
    if kind not in kinds:
        raise InputError(f"--to {kind}: no such exporter{nearest(kind, kinds)}")
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder")
    out = out or _default_folder(checkpoint.resolve(), kind)
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder with -o")
    module = plugins.load(plugins.EXPORTERS, kind)
    pipeline.export_to(module, kind, module.Options(), Checkpoint(checkpoint, allow_quantized=True), out)
    return out


def _default_folder(checkpoint: Path, kind: str) -> Path:
    """Beside the checkpoint, or beside the finished output it is part of, which stays as its manifest lists it."""
    base = checkpoint.parent if (checkpoint.parent / MANIFEST).is_file() else checkpoint
    return base.with_name(f"{base.name}-{kind}")
