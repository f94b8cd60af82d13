"""Markdown that a reader opens: tables and sections behind one line that says the main thing."""

import html

from compress.report.tables import Table
from compress.terminal.escaping import markdown, printable

OPENING = "<details><summary>"  # what a folded section begins with, at the beginning of a line; names are escaped


def section(summary: str, body: str) -> str:
    """`summary` is plain text, `body` Markdown, which GitHub reads within HTML only after an empty line. Empty where there is
    no body."""
    said = html.escape(printable(summary), quote=False)
    return f"{OPENING}{said}</summary>\n\n{body.strip()}\n\n</details>\n" if body.strip() else ""


def of(found: Table, below: str = "") -> str:
    """A table behind its title, with Markdown `below` it; empty where it has no rows."""
    if not found.rows:
        return ""
    left = len(found.rows) - found.brief
    rest = f"\n\nThe other {left:,} rows are in the JSON." if left > 0 else ""
    return section(found.title, f"{shown(found)}{rest}\n\n{below}")


def shown(found: Table) -> str:
    rows = (list(map(_cell, cells)) for cells in found.rows[: found.brief])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (found.head, ["---"] * len(found.head), *rows))


def _cell(text: str) -> str:
    return f"**{text}**" if Table.is_alarming(text) else markdown(text)
