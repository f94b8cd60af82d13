"""The flags of `compress sensitivity` and where its results go."""

import json
import os
import sys
from pathlib import Path

from compress.checkpoint.writer import write_json, write_text
from compress.errors import InputError
from compress.sensitivity import heatmap, table

STDOUT = "-"


def refuse_unwritable(json_file: str | None, html_file: str | None) -> None:
    """A result that cannot be written is refused before the work."""
    for option, target in (("--json", json_file), ("--html", html_file)):
        if target is None or (option, target) == ("--json", STDOUT):
            continue
        path = Path(target).absolute()
        usable = target != STDOUT and not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK)
        if not usable:
            raise InputError(f"{option} {target}: expected a file in a folder that exists and can be written to")


def write(result: dict, recipe: str, json_file: str | None, html_file: str | None) -> None:
    """Files appear whole or not at all; the table goes to stderr where JSON owns stdout."""
    if json_file == STDOUT:
        json.dump(result, sys.stdout, indent=2)
        sys.stdout.write("\n")
    elif json_file is not None:
        write_json(Path(json_file), result)
    table.show(result, stderr=json_file == STDOUT)
    if html_file is not None:  # last: drawing must not cost the figures
        write_text(Path(html_file), heatmap.render(result, recipe))
