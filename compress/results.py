"""What commands that measure a model share: which model it was, and where the figures go."""

import os
from pathlib import Path

import click

from compress import strict_json
from compress.checkpoint.writer import write_json
from compress.errors import InputError
from compress.model import HybridModel
from compress.source import Source

STDOUT = "-"


def refuse_unwritable(json_file: str | None, html_file: str | None = None) -> None:
    """A result that cannot be written is refused before the work."""
    for option, target in (("--json", json_file), ("--html", html_file)):
        if target is None or (option, target) == ("--json", STDOUT):
            continue
        path = Path(target).absolute()
        usable = target != STDOUT and not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)
        if not usable:
            raise InputError(f"{option} {target}: expected a file in a folder that exists and can be written to")


def put_json(result: dict, target: str | None) -> None:
    """To a file, to stdout for `-`, or nowhere."""
    if target == STDOUT:
        click.echo(strict_json.dumps(result))
    elif target is not None:
        write_json(Path(target), result)


def describe(source: Source, model: HybridModel, weights_sha256: str) -> dict:
    """What a result says of the model it is about."""
    return {
        "name": source.name,
        "revision": source.revision,
        "weights_sha256": weights_sha256,
        "model_type": model.model_type,
        "parameters": model.parameters,
    }


def prompts_as_text(used: list[dict]) -> str:
    """`prose (64 windows, 32,768 tokens), ...` of a result's `prompts`."""
    return ", ".join(f"{p['name']} ({p['windows']} windows, {p['tokens']:,} tokens)" for p in used)
