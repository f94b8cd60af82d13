"""`compress export`: one export of a checkpoint folder."""

from pathlib import Path

from compress import pipeline, plugins
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError, nearest


def export_checkpoint(checkpoint: Path, kind: str, out: Path | None) -> Path:
    """Exports to `out` (by default beside the checkpoint, named by the kind), which must not exist. Returns it."""
    kinds = plugins.names(plugins.EXPORTERS)
    if kind not in kinds:
        raise InputError(f"--to {kind}: no such exporter{nearest(kind, kinds)}")
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: no such folder")
    out = out or checkpoint.resolve().with_name(f"{checkpoint.resolve().name}-{kind}")
    if out.exists():
        raise InputError(f"{out}: exists already; choose another folder with -o")
    module = plugins.load(plugins.EXPORTERS, kind)
    pipeline.export_to(module, kind, module.Options(), Checkpoint(checkpoint, allow_quantized=True), out)
    return out
