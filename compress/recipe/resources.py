"""Where the shipped recipes, prompts, documents and the reference model lie.

In a wheel they are package data under `compress/data/`; in a checkout they are the top-level folders.
"""

import difflib
import re
from pathlib import Path

from compress.errors import InputError, nearest

_PACKAGE = Path(__file__).resolve().parents[1]
SUFFIXES = (".yaml", ".yml")  # of recipes
VERSION = re.compile(rb"^version\s*:", re.MULTILINE)


def folder(name: str) -> Path:
    """`recipes`, `calibration_data`, `models` or `docs`, from the wheel or the checkout."""
    packaged = _PACKAGE / "data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def shipped_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder("recipes").glob("*.yaml"), key=lambda path: path.stem)}


def documents() -> dict[str, Path]:
    """The README and the files of docs/, by name; the links between them lead to what ships."""
    docs = folder("docs")
    return {path.stem.lower(): path for path in (docs.parent / "README.md", *sorted(docs.glob("*.md")))}


def document(name: str) -> Path:
    """By name, or as links spell it: `onnx`, `docs/onnx.md`, `README`."""
    known = documents()
    stem = Path(name).stem.lower()
    if stem not in known:
        raise InputError(f"there is no document '{name}'{nearest(stem, known)}")
    return known[stem]


def shipped_recipe(name: str) -> Path:
    shipped = shipped_recipes()
    if name not in shipped:
        raise InputError(f"there is no shipped recipe '{name}'{nearest(name, shipped)}")
    return shipped[name]


def find_recipe(name_or_path: str) -> Path:
    """A path, or the name of a shipped recipe."""
    path, shipped = Path(name_or_path), shipped_recipes()
    is_there = _exists(path)
    if is_there and path.is_file():
        return path
    if name_or_path in shipped:
        return shipped[name_or_path]
    if path.stem in shipped and not is_there and path.parent.name == "recipes":
        return shipped[path.stem]  # `recipes/tiny-int8.yaml` also works away from the checkout
    if is_there and path.is_dir():
        raise InputError(
            f"recipe '{name_or_path}' is a folder; expected a YAML file or the name of a shipped recipe{_in_folder(path)}"
        )
    raise InputError(
        f"recipe '{name_or_path}' is neither a file nor a shipped recipe{_meant(name_or_path) or nearest(name_or_path, shipped)}"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long to be a path, or a folder that may not be looked into
        return False


def _in_folder(path: Path) -> str:
    """What a folder may have been meant as: a model, which is given with -m, or the one recipe beside it or in it."""
    if (path / "config.json").is_file():
        return f"; a model is given with -m, as in 'compress apply tiny-int8 -m {path}'"
    found = _same_name(path) or [file for file in _recipe_files(path) if _says_version(file)]
    found = [file for file in found if file.name == "recipe.yaml"] or found  # that of an output, as it was given
    return f"; did you mean '{found[0]}'?" if len(found) == 1 else ""


def _meant(name: str) -> str:
    """The recipe file of the same name with another suffix, or with one, else the file or shipped name most like it."""
    names = [*_recipe_files(Path(name).parent), *map(Path, shipped_recipes())]
    known = {str(path).casefold(): path for path in reversed(names)}
    close = difflib.get_close_matches(name.casefold(), known, n=1, cutoff=0.75)
    found = _same_name(Path(name)) or [known[folded] for folded in close]
    return f"; did you mean '{found[0]}'?" if found else ""


def _same_name(path: Path) -> list[Path]:
    names = {path.name, path.stem if path.suffix.lower() in SUFFIXES else path.name}
    return [file for file in _recipe_files(path.parent) if file.stem in names]


def _says_version(file: Path) -> bool:
    """Whether it looks like a recipe, and not like a file of limits."""
    try:
        return VERSION.search(file.read_bytes()[:4096]) is not None
    except OSError:
        return False


def _recipe_files(folder: Path) -> list[Path]:
    """The YAML files in a folder, by name; none where it cannot be looked into."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    except OSError:
        return []


def find_model(name: str, recipe_folder: Path | None = None) -> Path | None:
    """The folder a recipe's `model` means: beside the recipe, in the working folder, then among the shipped data."""
    bases = [recipe_folder] if recipe_folder else []
    bases += [Path.cwd(), folder("models").parent]
    try:
        return next((base / name for base in bases if name and (base / name).is_dir()), None)
    except OSError:  # a name too long to be a path
        return None
