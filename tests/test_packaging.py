"""The wheel: what it holds, that nothing else lands on the import path, and that it works away from the checkout."""

import importlib.util
import os
import posixpath
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path

import pytest

import compress
from compress.recipe import resources

ROOT = Path(__file__).resolve().parents[1]
HAS_BACKEND = importlib.util.find_spec("hatchling") is not None
HOOK_SOURCE = "exporters/optimum_hook/register_compress.py"  # moves to where optimum looks for it
HOOK = "optimum/commands/register/register_compress.py"
DATA = {"recipes": "compress/data/recipes", "calibration_data": "compress/data/calibration_data"}
DATA = {**DATA, "models": "compress/data/models", "docs": "compress/data/docs"}  # in the checkout -> in the wheel
LEFT_OUT = ROOT / "models" / "tiny-nemotron-h"  # for tests and demos from the checkout

# without the build backend pip fetches it, which a test must not do unasked
pytestmark = [] if HAS_BACKEND else [pytest.mark.slow]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if HAS_BACKEND else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "-w", str(folder), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def contents(wheel) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(set(names)) == len(names)
        return {name: archive.read(name) for name in names}


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def info(contents: dict[str, bytes], name: str) -> str:
    (path,) = (path for path in contents if path.split("/")[0].endswith(".dist-info") and path.endswith(f"/{name}"))
    return contents[path].decode()


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def test_nothing_else_lands_on_the_import_path(contents):
    tops = {name.split("/")[0] for name in contents}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"compress", "exporters", "cli.py", "optimum"}
    assert len([top for top in tops if top.endswith(".dist-info")]) == 1


def test_the_only_file_among_optimum_s_is_the_hook(contents):
    assert [name for name in contents if name.startswith("optimum/")] == [HOOK]
    assert contents[HOOK] == (ROOT / HOOK_SOURCE).read_bytes()


@pytest.mark.parametrize("folder", ["compress", "exporters"])
def test_every_module_and_template_of_the_checkout_is_in_the_wheel(contents, folder):
    files = {path.relative_to(ROOT).as_posix() for path in files_below(ROOT / folder)}
    assert any(name.endswith(".py") for name in files)
    assert files - {HOOK_SOURCE} <= set(contents)


@pytest.mark.parametrize("folder", ["compress", "exporters"])
def test_type_checkers_may_read_the_annotations(contents, folder):
    assert f"{folder}/py.typed" in contents


@pytest.mark.parametrize("folder", sorted(DATA))
def test_every_shipped_file_is_in_the_wheel_byte_for_byte(contents, folder):
    files = files_below(ROOT / folder) - files_below(LEFT_OUT)
    shipped = {path.relative_to(ROOT / folder).as_posix(): path for path in files}
    packed = {name.removeprefix(DATA[folder] + "/") for name in contents if name.startswith(DATA[folder] + "/")}
    assert packed == set(shipped)
    assert shipped
    for name, path in shipped.items():
        assert contents[f"{DATA[folder]}/{name}"] == path.read_bytes(), name


def test_the_recipes_prompts_and_the_reference_model_are_there(contents):
    assert {f"compress/data/recipes/{name}.yaml" for name in resources.shipped_recipes()} <= set(contents)
    assert {f"compress/data/calibration_data/{name}.jsonl" for name in ("prose", "heldout")} <= set(contents)
    model = {f"compress/data/models/tiny-jamba/{n}" for n in ("model.safetensors", "config.json", "tokenizer.json")}
    assert model <= set(contents)
    assert (LEFT_OUT / "config.json").is_file()
    assert not [name for name in contents if LEFT_OUT.name in name]


LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_every_link_of_a_document_leads_to_a_file_that_ships(contents):
    documents = [name for name in contents if name.startswith("compress/data/") and name.endswith(".md")]
    assert {"compress/data/README.md", "compress/data/docs/onnx.md", "compress/data/CHANGELOG.md"} <= set(documents)
    links = [(name, link) for name in documents for link in LINK.findall(contents[name].decode()) if ":" not in link]
    assert len(links) > 40
    for name, link in links:
        assert posixpath.normpath(posixpath.join(posixpath.dirname(name), link)) in contents, (name, link)


def test_the_readme_in_the_wheel_is_the_readme(contents):
    assert contents["compress/data/README.md"] == (ROOT / "README.md").read_bytes()
    assert info(contents, "METADATA").endswith((ROOT / "README.md").read_text())


@pytest.mark.parametrize("package", ["compress", "exporters"])
def test_type_checkers_are_told_of_the_types(contents, package):
    assert contents[f"{package}/py.typed"] == b""


def test_no_leftovers_are_packed(contents):
    ends = (".pyc", ".tmp", ".partial", ".orig", ".ipynb")
    assert not [name for name in contents if name.endswith(ends) or "__pycache__" in name or "/." in name]


def test_the_command_the_version_and_the_licence_are_declared(contents):
    scripts = ConfigParser()
    scripts.read_string(info(contents, "entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"compress": "cli:main"}
    metadata = Parser().parsestr(info(contents, "METADATA"))
    assert metadata["Version"] == compress.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert info(contents, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def elsewhere(unpacked: Path, folder: Path, *arguments: str) -> str:
    """Standard output of Python with only the unpacked wheel on its path, started in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_wheel_lists_its_recipes_away_from_the_checkout(unpacked, tmp_path):
    place = elsewhere(unpacked, tmp_path, "-c", "import compress; print(compress.__file__)")
    assert Path(place.strip()).is_relative_to(unpacked)
    listed = elsewhere(unpacked, tmp_path, "-m", "cli", "recipes").splitlines()
    assert [line.split()[0] for line in listed] == sorted(resources.shipped_recipes())


def test_the_wheel_runs_as_a_module_whatever_the_working_folder_holds(unpacked, tmp_path):
    (tmp_path / "cli.py").write_text("raise SystemExit('not this one')")
    assert elsewhere(unpacked, tmp_path, "-m", "compress", "-V") == f"compress, version {compress.__version__}\n"


def test_the_wheel_prints_its_documents_away_from_the_checkout(unpacked, tmp_path):
    *listed, place = elsewhere(unpacked, tmp_path, "-m", "compress", "docs").splitlines()
    assert Path(place.removeprefix("in ")).is_relative_to(unpacked)
    names = [line.split()[0] for line in listed]
    assert set(names) == {"readme"} | {path.stem for path in (ROOT / "docs").glob("*.md")}
    for name, file in (("readme", "README.md"), ("onnx", "docs/onnx.md")):
        assert elsewhere(unpacked, tmp_path, "-m", "compress", "docs", name) == (ROOT / file).read_text()


def test_the_wheel_finds_its_model_and_prompts_away_from_the_checkout(unpacked, tmp_path):
    plan = elsewhere(unpacked, tmp_path, "-m", "cli", "apply", "tiny-int8", "--dry-run")
    assert "tiny-jamba" in plan
    assert not list(tmp_path.iterdir())
