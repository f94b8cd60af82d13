"""Base of every options model: unknown keys are errors, values are frozen, NaN and infinity are no numbers."""

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from compress.errors import InputError, nearest
from compress.strict.json_text import Json, JsonObject

T = TypeVar("T")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    def idle(self) -> set[str]:
        """Keys that change nothing as the others stand, beside those that hold nothing."""
        return set()

    def in_force(self) -> JsonObject:
        """The keys that have an effect, as plain data: what a plan shows."""
        plain: JsonObject = self.model_dump(mode="json", exclude=self.idle())
        return _mapping_without_nothing(plain)


def _mapping_without_nothing(plain: Mapping[str, Json]) -> JsonObject:
    """Json data without what is empty."""
    kept = {key: _without_nothing(value) for key, value in plain.items()}
    return {key: value for key, value in kept.items() if value not in (None, {}, [])}


def _without_nothing(plain: Json) -> Json:
    if isinstance(plain, dict):
        return _mapping_without_nothing(plain)
    return [_without_nothing(value) for value in plain] if isinstance(plain, list) else plain


Settings = TypeVar("Settings", bound=Strict)


class KeyedError(ValueError):
    """A validator's refusal of one key of a mapping, so that the sentence can name that key's line."""

    def __init__(self, key: str, message: str):
        super().__init__(message)
        self.key = key


def key_path(error: ErrorDetails) -> tuple[str | int, ...]:
    """The keys a pydantic error is about: its location without the mark for "the key itself", which is no key."""
    path = tuple(part for part in error["loc"] if part != "[key]")
    cause = error.get("ctx", {}).get("error")
    return (*path, cause.key) if isinstance(cause, KeyedError) else path


def what_was_expected(error: ErrorDetails) -> str:
    """One pydantic error in words, with the nearest of the known values where there is a list of them."""
    if error["type"] in ("enum", "literal_error"):
        expected = str(error["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return f"'{error['input']}' is not known{nearest(error['input'], expected)}"
    if error["type"] == "model_type":
        return f"expected a mapping of options, not {error['input']!r:.80}"
    if error["type"] == "tuple_type":
        return f"expected a list, such as [a, b], not {error['input']!r:.80}"
    if error["type"] == "string_type":
        return f"expected text, not {error['input']!r:.80}; put it in quotes where it is meant as text"
    message = error["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def from_flags(model: type[Settings], **values: object) -> Settings:
    """Settings that a command's flags give; what is wrong with them in one sentence."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in key_path(first))
        if first["type"] == "extra_forbidden":
            raise InputError(f"unknown key '{key}'{nearest(key, list(model.model_fields))}") from None
        named = f"{key}: " if key else ""  # none where keys contradict each other
        raise InputError(f"{named}{what_was_expected(first)}") from None


def no_truth_value(value: T) -> T:
    """YAML's yes, no, true and false would count as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number, not yes/no or true/false")
    return value


WholeNumber = Annotated[int, BeforeValidator(no_truth_value)]
Number = Annotated[float, BeforeValidator(no_truth_value)]
