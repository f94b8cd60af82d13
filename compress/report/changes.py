"""Two artifacts beside each other on the terminal: what was, what is, and whether that is better."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from compress.check.changes import ChangeFacts
from compress.report.terminal import interval_words


def show(title: str, rows: Sequence[ChangeFacts], console: Console) -> None:
    table = Table("metric", "phase", "old", "new", "difference", "95 % interval", "", title=title, title_justify="left")
    for row in rows:
        figures = (_words(row, row[key]) for key in ("old", "new", "difference"))
        table.add_row(
            row["metric"], row["phase"] or "", *figures, interval_words(row["low"], row["high"]), row["outcome"]
        )
    console.print(table)


def _words(row: ChangeFacts, value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if row["metric"] == "weight_bytes" else f"{value:.6g}"
