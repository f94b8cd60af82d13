"""JSON as every parser reads it: NaN and infinity, which JSON does not have, are written as null."""

import json
import math


def dumps(value) -> str:
    """Indented text."""
    return json.dumps(_without_nan(value), indent=2, allow_nan=False)


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
