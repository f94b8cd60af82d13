"""Any value as plain data, which JSON and YAML can hold."""

from collections.abc import Mapping

from compress.strict.json_text import Json


def plain(value: object) -> Json:
    """Keys as text, sets and tuples as lists, what JSON has no form for as Python prints it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)
