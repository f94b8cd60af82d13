"""Writers of deployable artifacts. An exporter is one file named by its recipe key (`exporters/onnx.py` is `- onnx: {}`), with
one class: an `Exporter`. Shared blocks for building graphs live in `exporters/graph/`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from compress.strict.plugin import OptionsT, Plugin

if TYPE_CHECKING:  # a recipe is validated without torch
    from compress.calibration.ranges import Ranges
    from compress.checkpoint.reader import Checkpoint
    from compress.model.hybrid import HybridModel
    from compress.model.weight import Unit
    from compress.output_folder.build_facts import BuildFacts
    from compress.runtime.runtimes import Runtime


@dataclass(frozen=True)
class Exported:
    """One artifact: `main` within its folder, `files` it needs to run, the stored format of every weight by name.

    `main` is what a check opens: a model.onnx, or a checkpoint folder. `build` is what was built of it, where something is."""

    kind: str
    main: str
    files: tuple[str, ...]
    weight_bytes: int
    formats: dict[str, str]
    notes: tuple[str, ...] = field(default=())
    build: BuildFacts | None = None

    def bytes(self, folder: Path) -> int:
        return sum((folder / name).stat().st_size for name in self.files)


class Exporter(Plugin[OptionsT]):
    """An exporter, bound to its block in a recipe: `self.options`."""

    _together = (("needs_ranges", "fitted"),)

    instead_of_ranges: ClassVar[str] = ""  # how to do without `needs_ranges` where there is no text, in words

    def refuse(self, model: HybridModel) -> None:
        """Raises InputError for a model, as it will be stored, that this exporter has no way to write, before any work."""

    def plans(self, model: HybridModel) -> list[str]:
        """What a dry run says will be made beside the graph."""
        return []

    @abstractmethod
    def predict_bytes(self, units: Sequence[Unit]) -> int:
        """Bytes of weights, before any is read."""

    def most_built_bytes(self, units: Sequence[Unit]) -> int:
        """Bytes of what is built beside the weights, at most: whether they fit on the disk is looked at before the work."""
        return 0

    @property
    def needs_ranges(self) -> bool:
        """Whether it asks how large hidden states become: calibration tokens are read then, also where no pass needs any."""
        return False

    def fitted(self, checkpoint: Checkpoint, ranges: Ranges) -> Self:
        """The exporter as it applies to an opened checkpoint, in which these are the largest values; it exports then. Raises
        InputError for a model that it cannot write after all."""
        return self

    @abstractmethod
    def export(self, checkpoint: Checkpoint, folder: Path, advance: Callable[[int], None]) -> None:
        """Writes an opened checkpoint into an empty folder; `advance` hears of parameters, for the progress bar. Another
        folder has the final name: renaming is done by the caller."""

    @abstractmethod
    def describe(self, folder: Path) -> Exported:
        """What was written, read back from the folder."""

    def runtimes(self, model: HybridModel) -> list[Runtime]:
        """Which runtimes take what will be written; none where that is not known."""
        return []
