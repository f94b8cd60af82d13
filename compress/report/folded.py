"""Markdown that a reader opens: tables and sections behind one line that says the main thing."""

import html
from collections.abc import Sequence

from compress.terminal.escaping import printable

OPENING = "<details><summary>"  # what a folded section begins with, at the beginning of a line; names are escaped


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def section(summary: str, body: str) -> str:
    """`summary` is plain text, `body` Markdown, which GitHub reads within HTML only after an empty line. Empty where there is
    no body."""
    said = html.escape(printable(summary), quote=False)
    return f"{OPENING}{said}</summary>\n\n{body.strip()}\n\n</details>\n" if body.strip() else ""
