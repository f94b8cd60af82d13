"""What the configurations of all families share: bounds of their numbers, and one sentence for what is wrong in a file."""

from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from compress.errors import InputError
from compress.model.expert_counts import SECTION

MAX_COUNT = 10_000  # of layers and of experts: far beyond any model, keeps a corrupt config from being enumerated
MAX_EXPERTS_IN_ALL = 50_000
MAX_SIZE = 1 << 31

Config = TypeVar("Config", bound=BaseModel)


def size(default: Any, most: int = MAX_SIZE, least: int = 1) -> Any:
    return Field(default, ge=least, le=most)


def refuse_too_many_experts(layers: int, experts: int) -> None:
    """Raises ValueError; the layers are those counted with so many experts each."""
    if layers * experts > MAX_EXPERTS_IN_ALL:
        raise ValueError(f"{layers} layers of {experts} experts are more than any model has")


def validated(config: type[Config], values: dict, source: str) -> Config:
    """The values of `source` as a configuration; raises InputError naming the file and the key."""
    try:
        return config.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        inside = None if first["loc"][:1] == (SECTION,) else 1  # of other keys pydantic adds what it tried
        key = ".".join(str(part) for part in first["loc"][:inside])
        message = first["msg"].removeprefix("Value error, ")
        given = f" (it is {first['input']!r:.80})" if key else ""
        raise InputError(f"{source}: {key + ': ' if key else ''}{message}{given}") from None
