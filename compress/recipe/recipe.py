"""A recipe: YAML in, a frozen and fully validated `Recipe` out. Imports neither torch nor any model code."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator

from compress import plugins
from compress.errors import InputError, nearest
from compress.recipe import check as settings
from compress.recipe import resources
from compress.recipe.calibration import Calibration
from compress.strict import yaml_text
from compress.strict.models import KeyedError, Strict, key_path, no_truth_value, what_was_expected
from compress.strict.yaml_text import Document, KeyPath


class OneKey(Strict):
    """A mapping that names exactly one of its fields, such as `- quantize: {...}`; `- onnx:` alone means the defaults."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_means_defaults(cls, given):
        if isinstance(given, dict) and len(given) == 1:
            return {name: {} if options is None else options for name, options in given.items()}
        return given

    @model_validator(mode="after")
    def _exactly_one(self):
        if len(self.model_fields_set) != 1:
            raise ValueError(f"expected exactly one of: {', '.join(type(self).model_fields)}")
        return self

    @property
    def name(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def options(self) -> Strict:
        return getattr(self, self.name)


def _choice(title: str, package: str) -> type[OneKey]:
    fields = {name: (plugins.load(package, name).Options | None, None) for name in plugins.names(package)}
    return create_model(title, __base__=OneKey, **fields)


@cache
def recipe_model() -> type[Strict]:
    """The pydantic model, with one field per pass and per exporter found on disk."""

    class Recipe(Strict):
        version: Annotated[Literal[1], BeforeValidator(no_truth_value)]
        model: str | None = None
        calibration: Calibration | None = None
        passes: tuple[_choice("Pass", plugins.PASSES), ...] = ()
        export: tuple[_choice("Export", plugins.EXPORTERS), ...] = ()
        check: settings.Check | None = Field(default=None)

        @model_validator(mode="after")
        def _each_export_once(self):
            kinds = [step.name for step in self.export]
            if len(set(kinds)) != len(kinds):
                raise ValueError(f"an exporter is listed twice: {', '.join(kinds)}")
            return self

        @model_validator(mode="after")
        def _no_shared_prompts(self):
            generated = ("self", "recall")  # seeded apart
            asked = self.calibration.prompts if self.calibration else ()
            shared = [name for name in asked if self.check and name in self.check.prompts and name not in generated]
            if shared:
                message = f"'{shared[0]}' is in calibration and in check: a model is not judged on what tuned it"
                raise KeyedError("calibration", message)
            return self

    return Recipe


class LoadedRecipe:
    """A validated recipe with where it came from: `recipe`, `name`, `text` (verbatim), `folder`."""

    def __init__(self, path: Path, text: str, recipe):
        self.path, self.text, self.recipe = path, text, recipe
        self.name, self.folder = path.stem, path.resolve().parent

    def resolved_yaml(self) -> str:
        """The recipe after overrides and defaults, as YAML that loads again."""
        plain = self.recipe.model_dump(mode="json", exclude_none=True)
        plain["passes"] = [{s.name: s.options.model_dump(mode="json", exclude_none=True)} for s in self.recipe.passes]
        plain["export"] = [{s.name: s.options.model_dump(mode="json", exclude_none=True)} for s in self.recipe.export]
        return yaml_text.dump(plain)


def load_recipe(name_or_path: str, overrides: tuple[str, ...] = ()) -> LoadedRecipe:
    """Reads, overrides (`KEY=VALUE` with dotted keys) and validates; raises InputError naming file, line and key."""
    path = resources.find_recipe(name_or_path)
    document = yaml_text.load(path)
    if not isinstance(document.data, dict):
        raise InputError(f"{path}: a recipe is a mapping that begins with 'version: 1'")
    _validate(document, document.data, set())
    overridden: set[KeyPath] = set()
    for override in overrides:
        overridden.add(override_key(document.data, override))
    recipe = _validate(document, document.data, overridden)
    return LoadedRecipe(path, path.read_bytes().decode("utf-8"), recipe)  # bytes: line ends stay as they are


def override_key(data: dict, override: str, example: str = "passes.0.quantize.weights=int8") -> KeyPath:
    """Sets one dotted key in plain recipe data; a number addresses a list item, a missing mapping is made."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected KEY=VALUE, such as {example}")
    value = yaml_text.parse_scalar(text, f"--set {key}")
    path = tuple(int(part) if part.isascii() and part.isdigit() else part for part in key.split("."))
    target: Any = data
    for part in path[:-1]:
        target = _step(target, part, key)
    _assign(target, path[-1], value, key)
    return path


def _step(target, part, key: str):
    if isinstance(target, list):
        if not isinstance(part, int) or part >= len(target):
            raise InputError(f"--set {key}: there is no item '{part}' in that list of {len(target)}")
        inner = target[part]
    else:
        part = str(part)
        if target.get(part) is None:
            target[part] = {}
        inner = target[part]
    if not isinstance(inner, dict | list):
        raise InputError(f"--set {key}: '{part}' is a plain value, it has no keys")
    return inner


def _assign(target, part, value, key: str) -> None:
    if not isinstance(target, list):
        target[str(part)] = value
    elif isinstance(part, int) and part < len(target):
        target[part] = value
    else:
        raise InputError(f"--set {key}: there is no item '{part}' in that list of {len(target)}")


def _validate(document: Document, data: dict, overridden: set[KeyPath]):
    try:
        return recipe_model().model_validate(data)
    except ValidationError as error:
        raise InputError(_sentence(document, error.errors(include_url=False)[0], overridden)) from None


def _sentence(document: Document, error: dict, overridden: set[KeyPath]) -> str:
    """One sentence for a pydantic error: file:line, the dotted key, what was expected."""
    path = key_path(error)
    key = ".".join(str(part) for part in path) or "the recipe"
    if any(path[: len(o)] == o[: len(path)] for o in overridden):
        where = "--set"
    else:
        line = document.line(path)
        where = f"{document.source}:{line}" if line else document.source
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key '{path[-1]}'{nearest(path[-1], _known_keys(path[:-1]))}"
    if error["type"] == "missing":
        return f"{where}: missing key '{key}'"
    return f"{where}: {key}: {what_was_expected(error)}"


def _known_keys(path: KeyPath) -> list[str]:
    """The field names the recipe model accepts at a key path."""
    model: Any = recipe_model()
    for part in path:
        if isinstance(part, int):
            continue
        model = _inner_model(model.model_fields[part].annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _inner_model(annotation):
    """The pydantic model inside `tuple[M, ...]`, `M | None` or `M`."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _inner_model(argument) if argument is not Ellipsis else None
        if inner is not None:
            return inner
    return None
