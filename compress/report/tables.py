"""What was found as tables of plain text, which report.md folds and report.html lets a reader sort."""

from collections.abc import Sequence
from typing import NamedTuple

ALARMING = frozenset(
    {"fail", "fails", "missed", "undecided", "not finite", "worse"}
)  # words of a cell that must be seen


class Table(NamedTuple):
    """`title` says the main thing. Without rows it is not shown. `bars` has for each row what is drawn as one: 1 is full.
    `brief`: the rows that are enough where they cannot be searched."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    bars: Sequence[float] = ()
    brief: int = 400

    @staticmethod
    def is_alarming(text: str) -> bool:
        return text in ALARMING or text.startswith("undecided (")


def number(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"


def known(value: float | None) -> str:
    """Empty where there is none."""
    return "" if value is None else f"{value:.4g}"


def span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def one_line(text: str | None, most: int) -> str:
    """The beginning of a text."""
    words = " ".join((text or "").split())
    return words if len(words) <= most else f"{words[:most]} ..."
