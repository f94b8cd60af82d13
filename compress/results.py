"""What commands that measure a model share: which model it was, where the figures go, the terminal they are shown on."""

import json
import os
import sys
from pathlib import Path

from rich.console import Console

from compress.checkpoint.writer import write_json
from compress.errors import InputError
from compress.model import HybridModel
from compress.source import Source

STDOUT = "-"
PLAIN_WIDTH = 140  # of what is not a terminal: files and pipes


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
        json.dump(result, sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif target is not None:
        write_json(Path(target), result)


def console(*, stderr: bool) -> Console:
    """For tables and sentences; wide enough for a table where no terminal says how wide it is."""
    found = Console(stderr=stderr, highlight=False, markup=False)
    if not found.is_terminal:
        found.width = PLAIN_WIDTH
    return found


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
