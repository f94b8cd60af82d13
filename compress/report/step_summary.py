"""The page of a step in GitHub Actions: what is appended to the file that $GITHUB_STEP_SUMMARY names."""

import os
import re
from pathlib import Path

from compress.report import folded
from compress.terminal import progress

VARIABLE = "GITHUB_STEP_SUMMARY"
MOST = 1 << 20  # bytes that GitHub takes of a step
CUT = "\nDetails were left out: GitHub takes no more than 1 MiB of a step.\n"


def append(text: str) -> None:
    """Where the variable is set. What cannot be written is a warning: the result does not depend on it."""
    name = os.environ.get(VARIABLE)
    if not name:
        return
    try:
        path = Path(name)
        there = path.stat().st_size if path.exists() else 0
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(fitted(("\n" if there else "") + text, MOST - there))
    except (OSError, ValueError) as error:  # a name with a NUL is none
        progress.warn(f"{VARIABLE}: {name}: {getattr(error, 'strerror', None) or error}")


def fitted(text: str, room: int) -> str:
    """As much as fits into so many bytes: first the longest details go. Nothing where the rest does not fit."""
    head, *details = re.split(f"^(?={re.escape(folded.OPENING)})", text, flags=re.MULTILINE)
    sizes, cut = [len(part.encode()) for part in (head, *details)], len(CUT.encode())
    if sum(sizes) <= room:
        return text
    parts = [head, *details]
    while sum(sizes) + cut > room and len(parts) > 1:
        longest = max(range(1, len(parts)), key=sizes.__getitem__)
        del parts[longest], sizes[longest]
    return "".join([*parts, CUT]) if sum(sizes) + cut <= room else ""
