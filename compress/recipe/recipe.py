"""A recipe: YAML in, a frozen and fully validated `Recipe` out. Imports neither torch nor any model code."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import ErrorDetails

from compress import plugins
from compress.errors import InputError, nearest
from compress.plugins import Exporter, Pass
from compress.recipe import check as settings
from compress.recipe import resources
from compress.recipe.calibration import Calibration
from compress.strict import yaml_text
from compress.strict.json_text import Json
from compress.strict.models import KeyedError, Strict, key_path, no_truth_value, what_was_expected
from compress.strict.yaml_text import Document, KeyPath

Settable = dict[str, Json] | list[Json]  # what has keys or items in plain recipe data


class NestedError(ValueError):
    """What pydantic refused of a step's options, beneath the step's name."""

    def __init__(self, error: ErrorDetails):
        super().__init__(error["msg"])
        self.error = error


class Step(Strict):
    """One item of a list in a recipe: `- quantize: {...}`; `- onnx:` alone means the defaults.

    A file is loaded only where a recipe names it."""

    PACKAGE: ClassVar[str]
    name: str
    options: SerializeAsAny[Strict]

    @classmethod
    def options_of(cls, name: str) -> type[Strict]:
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _exactly_one(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        known = plugins.names(cls.PACKAGE)
        for name in given:
            if name not in known:
                raise NestedError({"type": "extra_forbidden", "loc": (name,), "msg": "unknown", "input": given[name]})
        if len(given) != 1:
            raise ValueError(f"expected exactly one of: {', '.join(known)}")
        ((name, options),) = given.items()
        return {"name": name, "options": cls._validated(name, {} if options is None else options)}

    @classmethod
    def _validated(cls, name: str, options: object) -> Strict:
        try:
            return cls.options_of(name).model_validate(options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise NestedError({**first, "loc": (name, *first["loc"])}) from None

    def as_written(self) -> dict[str, dict[str, Json]]:
        """With every default, as it may stand in a recipe."""
        return {self.name: self.options.model_dump(mode="json", exclude_none=True)}


class PassStep(Step):
    PACKAGE = plugins.PASSES

    @classmethod
    def options_of(cls, name: str) -> type[Strict]:
        return plugins.load_pass(name).Options

    def bound(self) -> Pass[Strict]:
        """The pass with these options."""
        return plugins.load_pass(self.name)(self.options)


class ExportStep(Step):
    PACKAGE = plugins.EXPORTERS

    @classmethod
    def options_of(cls, name: str) -> type[Strict]:
        return plugins.load_exporter(name).Options

    def bound(self) -> Exporter[Strict]:
        """The exporter with these options."""
        return plugins.load_exporter(self.name)(self.options)


class Recipe(Strict):
    version: Annotated[Literal[1], BeforeValidator(no_truth_value)]
    model: str | None = None
    calibration: Calibration | None = None
    passes: tuple[PassStep, ...] = ()
    export: tuple[ExportStep, ...] = ()
    check: settings.Check | None = Field(default=None)

    @model_validator(mode="after")
    def _each_export_once(self) -> Self:
        kinds = [step.name for step in self.export]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"an exporter is listed twice: {', '.join(kinds)}")
        return self

    @model_validator(mode="after")
    def _no_shared_prompts(self) -> Self:
        generated = ("self", "recall")  # seeded apart
        asked = self.calibration.prompts if self.calibration else ()
        shared = [name for name in asked if self.check and name in self.check.prompts and name not in generated]
        if shared:
            message = f"'{shared[0]}' is in calibration and in check: a model is not judged on what tuned it"
            raise KeyedError("calibration", message)
        return self

    def resolved_yaml(self) -> str:
        """After overrides and defaults, as YAML that loads again."""
        plain = self.model_dump(mode="json", exclude_none=True)
        plain["passes"] = [step.as_written() for step in self.passes]
        plain["export"] = [step.as_written() for step in self.export]
        return yaml_text.dump(plain)


class LoadedRecipe:
    """A validated recipe with where it came from: `recipe`, `name`, `text` (verbatim), `folder`."""

    def __init__(self, path: Path, text: str, recipe: Recipe):
        self.path, self.text, self.recipe = path, text, recipe
        self.name, self.folder = path.stem, path.resolve().parent

    def resolved_yaml(self) -> str:
        return self.recipe.resolved_yaml()


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


def override_key(data: dict[str, Json], override: str, example: str = "passes.0.quantize.weights=int8") -> KeyPath:
    """Sets one dotted key in plain recipe data; a number addresses a list item, a missing mapping is made."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected KEY=VALUE, such as {example}")
    value = yaml_text.parse_scalar(text, f"--set {key}")
    path = tuple(int(part) if part.isascii() and part.isdigit() else part for part in key.split("."))
    target: Settable = data
    for part in path[:-1]:
        target = _step(target, part, key)
    _assign(target, path[-1], value, key)
    return path


def _step(target: Settable, part: str | int, key: str) -> Settable:
    if isinstance(target, list):
        if not isinstance(part, int) or part >= len(target):
            raise InputError(f"--set {key}: there is no item '{part}' in that list of {len(target)}")
        inner = target[part]
    else:
        part = str(part)
        if target.get(part) is None:
            target[part] = {}
        elif part == "limits":
            target[part] = settings.limits_written_out(target[part])  # what is set stands beside the default ones
        inner = target[part]
    if not isinstance(inner, dict | list):
        raise InputError(f"--set {key}: '{part}' is a plain value, it has no keys")
    return inner


def _assign(target: Settable, part: str | int, value: Json, key: str) -> None:
    if not isinstance(target, list):
        target[str(part)] = value
    elif isinstance(part, int) and part < len(target):
        target[part] = value
    else:
        raise InputError(f"--set {key}: there is no item '{part}' in that list of {len(target)}")


def _validate(document: Document, data: dict[str, Json], overridden: set[KeyPath]) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(_sentence(document, _innermost(error.errors(include_url=False)[0]), overridden)) from None


def _innermost(error: ErrorDetails) -> ErrorDetails:
    """The error of a step's options itself, at its place in the recipe."""
    cause = error.get("ctx", {}).get("error")
    if not isinstance(cause, NestedError):
        return error
    return {**cause.error, "loc": (*error["loc"], *cause.error["loc"])}


def _sentence(document: Document, error: ErrorDetails, overridden: set[KeyPath]) -> str:
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
    """The keys that a recipe may have at a key path."""
    model: type[Strict] | None = Recipe
    for part in path:
        if model is not None and isinstance(part, str):
            model = (
                model.options_of(part) if issubclass(model, Step) else _inner_model(model.model_fields[part].annotation)
            )
    if model is None:
        return []
    return plugins.names(model.PACKAGE) if issubclass(model, Step) else list(model.model_fields)


def _inner_model(annotation: object) -> type[Strict] | None:
    """The pydantic model inside `tuple[M, ...]`, `M | None` or `M`."""
    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    inner = (_inner_model(argument) for argument in getattr(annotation, "__args__", ()) if argument is not Ellipsis)
    return next((model for model in inner if model is not None), None)
