"""What commands that measure a model share: which model it was, and where the figures go."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import click

from compress.disk import files
from compress.errors import InputError
from compress.model.hybrid import HybridModel
from compress.prompts import Used
from compress.recipe.source import Source
from compress.strict import json_text

STDOUT = "-"


def refuse_unwritable(json_file: str | None, html_file: str | None = None) -> None:
    """A result that cannot be written is refused before the work."""
    for option, target in (("--json", json_file), ("--html", html_file)):
        if target is not None and (option, target) != ("--json", STDOUT):
            refuse_unwritable_file(option, target)


def refuse_unwritable_file(option: str, target: str) -> None:
    if target == STDOUT or not _can_be_written(target):
        raise InputError(f"{option} {target}: expected a file in a folder that exists and can be written to")


def put_json(result: Mapping[str, object], target: str | None) -> None:
    """To a file, to stdout for `-`, or nowhere."""
    if target == STDOUT:
        click.echo(json_text.dumps(result))
    elif target is not None:
        put_text(json_text.dumps(result) + "\n", target)


def put_text(text: str, target: str) -> None:
    """A file appears whole or not at all; of a symbolic link the target does. A device or a pipe is written to, as far as
    someone reads it."""
    if _is_stream(target):
        gone = contextlib.suppress(BrokenPipeError)
        with gone, files.writing(Path(target)), open(target, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
    else:
        files.write_text(Path(os.path.realpath(target)), text)


def _can_be_written(target: str) -> bool:
    path = Path(os.path.realpath(target))
    if _is_stream(target):
        return os.access(target, os.W_OK)
    return not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)


def _is_stream(target: str) -> bool:
    path = Path(target)
    return path.exists() and not path.is_file() and not path.is_dir()


class Described(TypedDict):
    """What a result says of the model it is about."""

    name: str
    revision: str | None
    weights_sha256: str
    model_type: str
    parameters: int


def describe(source: Source, model: HybridModel, weights_sha256: str) -> Described:
    return {
        "name": source.name,
        "revision": source.revision,
        "weights_sha256": weights_sha256,
        "model_type": model.model_type,
        "parameters": model.parameters,
    }


def prompts_as_text(used: list[Used]) -> str:
    """`prose (64 windows, 32,768 tokens), ...` of a result's `prompts`."""
    return ", ".join(f"{p['name']} ({p['windows']} windows, {p['tokens']:,} tokens)" for p in used)
