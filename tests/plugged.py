"""Files beside the shipped passes and exporters, as a user would put them there."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import compress.passes
import exporters

PACKAGES = {"passes": compress.passes, "exporters": exporters}
ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"


class Plugged:
    """`add` writes a file and returns its path; `remove` forgets all of them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self._folder, self._patch, self._modules = folder, patch, []

    def add(self, kind: str, name: str, text: str) -> Path:
        package, folder = PACKAGES[kind], self._folder / kind
        if str(folder) not in package.__path__:
            folder.mkdir()
            self._patch.setattr(package, "__path__", [*package.__path__, str(folder)])
        path = folder / f"{name}.py"
        path.write_text(text)
        self._modules.append(f"{package.__name__}.{name}")
        importlib.invalidate_caches()
        return path

    def add_example(self, kind: str, name: str) -> Path:
        """The one of docs/architecture.md that begins with its name."""
        blocks = re.findall(r"```python\n(.*?)```", ARCHITECTURE.read_text(), re.DOTALL)
        (text,) = [block for block in blocks if block.startswith(f'"""`{name}`: ')]
        return self.add(kind, name, text)

    def remove(self) -> None:
        for name in self._modules:
            sys.modules.pop(name, None)
