"""JSON files: read with one sentence for whatever is wrong with them, written whole or not at all."""

from pathlib import Path

from compress.disk import files
from compress.disk.pointers import refuse_pointer
from compress.errors import InputError
from compress.strict import json_text
from compress.strict.json_text import JsonObject


def read_json(path: Path) -> JsonObject:
    """A JSON object from a file; raises InputError naming the file."""
    refuse_pointer(path)
    try:
        value = json_text.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    """Writes beside and renames: a reader never sees half a file. What is no number is written as null."""
    files.write_text(path, json_text.dumps(value) + "\n")
