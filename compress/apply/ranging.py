"""The largest values among a finished checkpoint's hidden states, for exporters that ask for them."""

from pathlib import Path

import torch

from compress import prompts
from compress.calibration import ranges
from compress.calibration.ranges import Ranges
from compress.checkpoint.reader import Checkpoint
from compress.disk import cache, files
from compress.errors import InputError
from compress.output_folder.workspace import CALIBRATION, Workspace
from compress.plugins import Exporter
from compress.recipe.calibration import Calibration
from compress.recipe.source import has_tokenizer
from compress.runtime.artifacts import CheckpointArtifact
from compress.strict.models import Strict

JOURNAL, STATES = f"{CALIBRATION}/ranges.json", f"{CALIBRATION}/ranges"


def refuse_without_text(exporter: Exporter[Strict], kind: str, folder: Path, calibration: Calibration) -> None:
    """Raises InputError where an exporter asks for them and there is no text to find them on."""
    if not exporter.needs_ranges or has_tokenizer(folder) or set(calibration.prompts) == {"self"}:
        return
    raise InputError(
        f"{folder}: has no tokenizer files, and export.{kind} looks for the largest values on calibration text"
        f"{exporter.instead_of_ranges and f'; {exporter.instead_of_ranges}'}"
    )


def in_workspace(written: Checkpoint, windows: list[torch.Tensor], space: Workspace, device: str) -> Ranges:
    """On the recipe's calibration windows, once, whoever asks; those of an interrupted run are there."""
    path = space.folder / JOURNAL
    if not space.is_done(JOURNAL):
        path.parent.mkdir(exist_ok=True)
        files.write_text(path, ranges.measured(written.model, windows, space.folder / STATES, device).to_json())
        space.mark_done(JOURNAL)
    return Ranges.from_json(path.read_text(encoding="utf-8"))


def on_shipped_text(written: Checkpoint) -> Ranges:
    """Without a recipe: on what one asks for that says nothing of calibration."""
    settings = Calibration()
    # the digest of a model only names what it writes itself
    sets = prompts.load_all(CheckpointArtifact(written), "", settings, purpose="calibration", seed=0)
    windows = prompts.longest_first(sets)
    cache.refuse_full_disk(ranges.bytes_needed(written.model, sum(map(len, windows))), "hidden states")
    with cache.scratch("ranges") as folder:
        return ranges.measured(written.model, windows, folder / "states")
