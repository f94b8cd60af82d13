"""How far the work is: a bar with an estimate on a terminal's stderr; of `apply`, plain lines for a log; and warnings.

A command that has stages names them beforehand. They share one bar, each with its number. Where the bar or stdout is no
terminal, and the command asks for it (`logged`), a line on stdout says what was finished and in which time. Everything
else is silent where no one watches, a program that calls us included.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from compress.terminal import output
from compress.terminal.escaping import printable

Advance = Callable[[int], None]
EVERY = 60.0  # seconds after which a log hears of a stage that still runs
SILENCE = 15.0  # seconds for which its lines wait: what fails this early ends with one sentence and nothing else


@contextlib.contextmanager
def task(description: str, total: int) -> Iterator[Advance]:
    """A bar over `total` steps; the value is called with how many were just done. A stage where that is one's name."""
    if _running is not None:
        with _running.task(description, total) as advance:
            yield advance
        return
    with _bar() as bar:
        row = bar.add_task(printable(description), total=total)
        yield lambda steps: bar.advance(row, steps)


@contextlib.contextmanager
def stages(names: Sequence[str]) -> Iterator[None]:
    """Tasks within are shown as "3 of 7: name" where they are the next, or a later one, of `names`."""
    global _running
    with _bar() as bar:
        _running = _Stages(names, bar)
        try:
            yield
            _running.say()
        finally:
            _running = None


@contextlib.contextmanager
def logged() -> Iterator[None]:
    """Stages within write lines to stdout where no bar tells of them."""
    global _logs
    _logs = True
    try:
        yield
    finally:
        _logs = False


def tell(sentence: str) -> None:
    """What is worth knowing between stages; nothing where there are none."""
    if _running is not None:
        _running.tell(sentence)


def note(sentence: str) -> None:
    """On stderr, beside whatever comes of the run."""
    print(f"compress: {printable(sentence)}", file=sys.stderr)


def warn(sentence: str) -> None:
    note(f"warning: {sentence}")


def _bar() -> Progress:
    """Without a watcher it shows nothing. What is printed meanwhile stays on the stream it was printed to."""
    console = output.console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(
        *columns, console=console, transient=True, redirect_stdout=False, disable=not console.is_terminal
    )  # fmt: skip


class _Stages:
    """A run through named stages, on one bar."""

    def __init__(self, names: Sequence[str], bar: Progress):
        self._names, self._passed, self._bar = list(names), 0, bar
        self._began = time.monotonic()
        self._unsaid: list[str] = []
        self._row: TaskID | None = None
        self._is_logged, self._told = _logs and (bar.disable or not sys.stdout.isatty()), time.monotonic()

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Advance]:
        """One stage, or a part of one, which has no number and no line at its end."""
        number = self._number(name)
        label = f"{number} of {len(self._names)}: {name}" if number else name
        row, began, done = self._show(label, total, is_stage=number is not None), time.monotonic(), 0

        def advance(steps: int) -> None:
            nonlocal done
            done += steps
            self._bar.advance(row, steps)
            if time.monotonic() - self._told >= EVERY:
                self._log(f"{label}: {done / max(total, 1):.0%} in {_minutes(began)}")
            self._say_if_late()

        yield advance
        if number:
            self._log(f"{label}: done in {_minutes(began)}")
        else:
            self._bar.remove_task(row)

    def tell(self, sentence: str) -> None:
        if not self._bar.disable:
            self._bar.console.print(sentence)
        self._log(sentence)

    def say(self) -> None:
        """The lines that waited."""
        if self._is_logged and self._unsaid:
            print(*self._unsaid, sep="\n", flush=True)
        self._unsaid.clear()

    def _number(self, name: str) -> int | None:
        """The place, from 1, of a stage that is still to come; of those before it the results were there."""
        if name not in self._names[self._passed :]:
            return None
        number = self._names.index(name, self._passed) + 1
        for passed in range(self._passed + 1, number):
            self._log(f"{passed} of {len(self._names)}: {self._names[passed - 1]}: kept from before")
        self._passed = number
        return number

    def _show(self, label: str, total: int, *, is_stage: bool) -> TaskID:
        """A new row of the bar; that of a stage takes the place of the last one's."""
        if is_stage and self._row is not None:
            self._bar.remove_task(self._row)
        row = self._bar.add_task(printable(label), total=total)
        if is_stage:
            self._row = row
        return row

    def _log(self, line: str) -> None:
        self._unsaid.append(printable(line))
        self._told = time.monotonic()
        self._say_if_late()

    def _say_if_late(self) -> None:
        if time.monotonic() - self._began >= SILENCE:
            self.say()


_running: _Stages | None = None
_logs = False


def _minutes(began: float) -> str:
    return f"{(time.monotonic() - began) / 60:.1f} minutes"
