"""Progress with an estimate on a terminal's stderr, silence elsewhere; and warnings, which are told everywhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from compress import output
from compress.escaping import printable

Advance = Callable[[int], None]


@contextlib.contextmanager
def task(description: str, total: int) -> Iterator[Advance]:
    """A bar over `total` steps; the value is called with how many were just done. Writes nothing where no one watches."""
    console = output.console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(printable(description), total=total)
        yield lambda steps: progress.advance(bar, steps)


def warn(sentence: str) -> None:
    """On stderr, beside whatever comes of the run."""
    print(f"compress: warning: {printable(sentence)}", file=sys.stderr)
