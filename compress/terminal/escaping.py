"""What people read, kept harmless: names and paths come from files, and may hold anything.

A name with an escape sequence would steer the terminal, one with a newline would forge a line, one with `|`, `<` or a
backtick would become markup in a report.
"""

import re

MARKDOWN = re.compile(r"[\\`*~\[\]|]|(?<!\w)_|_(?!\w)")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def printable(text: object, keep: str = "") -> str:
    """One line of visible characters; all others, but those in `keep`, as Python writes them in a string: `\\x1b`, `\\n`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))


def without_controls(text: str) -> str:
    """Text of a model for a terminal: as it is, but for the characters that could steer it."""
    return "".join(printable(c) if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" else c for c in text)


def markdown(text: object) -> str:
    """A name as plain text within Markdown, in a cell of a table too."""
    escaped = MARKDOWN.sub(r"\\\g<0>", printable(text))
    return "".join(ENTITIES.get(c, c) for c in escaped)


def code(text: object) -> str:
    """A name as a code span, between more backticks than it holds in a row."""
    shown = printable(text)
    fence = _fence(shown, 1)
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def code_block(text: str, language: str) -> str:
    """Lines of text as a fenced block that they cannot end."""
    fence = _fence(text, 3)
    return "\n".join((fence + language, printable(text.rstrip(), keep="\n"), fence))


def _fence(text: str, least: int) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(least, longest + 1)
