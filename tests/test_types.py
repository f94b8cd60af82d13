"""What the type checker says: nothing. mypy is strict, nothing is passed over without a reason, and contracts do not say Any."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([*(ROOT / "compress").rglob("*.py"), *(ROOT / "exporters").rglob("*.py"), ROOT / "cli.py"])
}
# arguments of click's, rich's and optimum's own methods; values of a report that is read where it was just written
PASSED_ON = {
    "compress/terminal/exits.py", "compress/terminal/output.py", "exporters/optimum_hook/tasks.py", "compress/report/schema.py",
}  # fmt: skip
REASONED = re.compile(r"# type: ignore\[[\w, -]+\]  # \w+( \S+){2,}")


def is_unchecked(path: str) -> bool:
    """Whether pyproject.toml still keeps a module out."""
    module = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    out = [name for table in SETTINGS["overrides"] if table.get("ignore_errors") for name in table["module"]]
    return any(fnmatch(module, name) or f"{module}.*" == name for name in out)


def unreasoned(source: str) -> list[str]:
    """Comments that silence the checker and do not say which error, and in some words why."""
    comments = (
        token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )
    return [comment for comment in comments if "type: ignore" in comment and not REASONED.search(comment)]


def says_any(source: str) -> bool:
    nodes = ast.walk(ast.parse(source))
    return any("Any" in (getattr(node, "id", None), getattr(node, "attr", None)) for node in nodes)


def test_mypy_has_nothing_to_say(tmp_path):
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--no-error-summary"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout + result.stderr == ""


def test_it_is_strict_and_looks_at_everything_that_ships():
    assert SETTINGS["strict"] is True
    assert {path.split("/")[0] for path in SOURCES} == set(SETTINGS["files"])


def test_whatever_is_passed_over_has_a_code_and_a_reason():
    assert {path: found for path, source in SOURCES.items() if (found := unreasoned(source))} == {}


@pytest.mark.parametrize(
    ("comment", "is_reasoned"),
    [
        ("x = f()  # type: ignore", False),
        ("x = f()  # type: ignore[arg-type]", False),
        ("x = f()  # type: ignore # click says more than it takes", False),
        ("x = f()  # type: ignore[arg-type]  # wrong", False),
        ("x = f()  # type: ignore[arg-type]  # its stubs know lists only", True),
        ("x = 'type: ignore'", True),
    ],
)
def test_a_reason_is_some_words_after_a_code(comment, is_reasoned):
    assert (unreasoned(comment) == []) == is_reasoned


def test_no_contract_says_any():
    saying = {path for path, source in SOURCES.items() if says_any(source) and not is_unchecked(path)}
    assert saying <= PASSED_ON


@pytest.mark.parametrize("source", ["def f(x: Any): ...", "x: dict[str, typing.Any] = {}", "Load = Callable[[], Any]"])
def test_any_is_seen_wherever_it_stands(source):
    assert says_any(source)
