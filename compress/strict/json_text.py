"""JSON as text. Ours is as every parser reads it: NaN and infinity, which JSON does not have, are written as null. A model's
is passed on with the values it came with. What is read has every name once."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
JsonObject: TypeAlias = dict[str, Json]


def loads(text: str | bytes) -> Json:
    """Raises ValueError, also where a name occurs twice in an object: readers disagree on which of its values counts; and
    RecursionError for what is nested too deeply."""
    value: Json = json.loads(text, object_pairs_hook=_without_duplicates)
    return value


def dumps(value: object) -> str:
    """Indented text of what JSON can hold."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False)


def dumps_as_it_came(value: Json) -> str:
    """The same of what came with a model: transformers writes and reads `Infinity`, where null would be another value."""
    return json.dumps(value, indent=2)


def finite(value: float | None) -> float | None:
    """A figure as JSON can hold it: None where it is no number."""
    return None if value is None or not math.isfinite(value) else value


def _without_duplicates(pairs: list[tuple[str, Json]]) -> JsonObject:
    result: JsonObject = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"'{name}' occurs twice")
        result[name] = value
    return result


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return finite(value) if isinstance(value, float) else value
