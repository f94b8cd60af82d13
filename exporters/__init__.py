"""Writers of deployable artifacts. An exporter is one file named by its recipe key (`exporters/onnx.py` is `- onnx: {}`).

It defines `Options` (its block in the recipe), `predict_bytes(units)`, `export(checkpoint, folder, options, advance)` and
`describe(folder)`, which reads back what was written. `runtimes(model, options)` may say what takes it.
Shared blocks for building graphs live in `exporters/graph/`.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Exported:
    """One artifact: `main` within its folder, `files` it needs to run, the stored format of every weight by name."""

    kind: str
    main: str
    files: tuple[str, ...]
    weight_bytes: int
    formats: dict[str, str]
    notes: tuple[str, ...] = field(default=())

    def bytes(self, folder: Path) -> int:
        return sum((folder / name).stat().st_size for name in self.files)
