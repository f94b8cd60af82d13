"""The terminal as every command uses it."""

from typing import Any

from rich.console import Console
from rich.text import Text

from compress.terminal.escaping import printable

PLAIN_WIDTH = 140  # of what is not a terminal: files and pipes


class _PrintableConsole(Console):
    """Strings, cells of tables included, are one line each, shown as they are: no markup, no names of emoji."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def console(*, stderr: bool) -> Console:
    """For tables and sentences; wide enough for a table where no terminal says how wide it is."""
    found = _PrintableConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not found.is_terminal:
        found.width = PLAIN_WIDTH
    return found
