"""The tree tells the order in which data flows: no import runs up, and exporters are known to one loader only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import compress

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "compress"
FACE = {"__init__", "__main__"}  # of the package, for its users: `compress.load`, `python -m compress`
DOOR = "plugins"
EXPORTERS = re.compile(r"exporters(\.\w+)*")


ROOMS = [room for line in compress.__doc__.splitlines() if line.startswith("    ") for room in line.split()]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(source: str) -> Iterator[str]:
    """Whatever a module imports, within functions too, as `package.module.name`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def room_of(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def runs_up(room: str, name: str) -> bool:
    """Whether a room that imports this looks at one above it (or at something that is in no room)."""
    package, _, rest = name.partition(".")
    above = rest.split(".")[0]
    if package != "compress" or above in ("", "__version__", DOOR, room):
        return package in ("", "cli")  # relative imports would hide where they lead
    return above not in ROOMS or ROOMS.index(above) > ROOMS.index(room)


def named_exporters(source: str) -> set[str]:
    """Modules of exporters that are imported, or named in a string."""
    words = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    named = {word for word in words if isinstance(word, str) and EXPORTERS.fullmatch(word)}
    return named | {name for name in imports(source) if EXPORTERS.fullmatch(name)}


def test_every_room_is_listed_once_and_is_there():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert sorted(ROOMS) == sorted(found - FACE - {DOOR})


def test_every_room_says_what_is_in_it():
    rooms = (path for path in SOURCES if path.endswith("/__init__.py"))
    assert [path for path in rooms if not ast.get_docstring(ast.parse(SOURCES[path]))] == []


def test_no_import_runs_up():
    found = [
        f"{path} imports {name}"
        for path, source in SOURCES.items()
        if room_of(path) not in FACE | {DOOR}
        for name in imports(source)
        if runs_up(room_of(path), name)
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["from compress import apply", "import compress.apply.plan", "def f():\n    from compress.apply import plan",
     "from compress.nowhere import x", "import cli", "from . import recipe", "from ..apply import plan"],
)  # fmt: skip
def test_an_import_that_runs_up_is_seen(source):
    assert any(runs_up("check", name) for name in imports(source))


@pytest.mark.parametrize("source", ["import compress", "from compress import plugins, recipe", "from rich import box"])
def test_an_import_that_runs_down_is_not(source):
    assert not any(runs_up("check", name) for name in imports(source))


def test_only_the_loader_names_exporters():
    naming = {path for path, source in SOURCES.items() if named_exporters(source)}
    assert naming == {"compress/plugins.py"}


@pytest.mark.parametrize(
    "source", ["import exporters", "from exporters.graph import reading", "load('exporters.onnx')"]
)
def test_a_module_that_names_exporters_is_seen(source):
    assert named_exporters(source)
