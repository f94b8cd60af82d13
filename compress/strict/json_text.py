"""JSON of ours, as every parser reads it: NaN and infinity, which JSON does not have, are written as null. And JSON of a model's,
which is passed on with the values it came with."""

import json
import math


def dumps(value) -> str:
    """Indented text."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False)


def dumps_as_it_came(value) -> str:
    """The same of what came with a model: transformers writes and reads `Infinity`, where null would be another value."""
    return json.dumps(value, indent=2)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
