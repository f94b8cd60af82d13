"""Where the shipped recipes, prompts and the reference model lie.

In a wheel they are package data under `compress/data/`; in a checkout they are the top-level folders.
"""

from pathlib import Path

from compress.errors import InputError, nearest

_PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """`recipes`, `calibration_data` or `models`, from the wheel or the checkout."""
    packaged = _PACKAGE / "data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name


def shipped_recipes() -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder("recipes").glob("*.yaml"), key=lambda path: path.stem)}


def shipped_recipe(name: str) -> Path:
    shipped = shipped_recipes()
    if name not in shipped:
        raise InputError(f"there is no shipped recipe '{name}'{nearest(name, shipped)}")
    return shipped[name]


def find_recipe(name_or_path: str) -> Path:
    """A path, or the name of a shipped recipe."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    if path.stem in shipped and not path.exists() and path.parent.name == "recipes":
        return shipped[path.stem]  # `recipes/tiny-int8.yaml` also works away from the checkout
    raise InputError(f"recipe '{name_or_path}' is neither a file nor a shipped recipe{nearest(name_or_path, shipped)}")


def find_model(name: str, recipe_folder: Path | None = None) -> Path | None:
    """The folder a recipe's `model` means: beside the recipe, in the working folder, then among the shipped data."""
    bases = [recipe_folder] if recipe_folder else []
    bases += [Path.cwd(), folder("models").parent]
    try:
        return next((base / name for base in bases if name and (base / name).is_dir()), None)
    except OSError:  # a name too long to be a path
        return None
