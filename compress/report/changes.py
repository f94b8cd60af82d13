"""Two artifacts beside each other: what was, what is, and whether that is better."""

from collections.abc import Sequence

import rich.table
from rich.console import Console

from compress.check import changes
from compress.check.changes import ChangeFacts
from compress.report.schema import AcrossFacts, CheckFacts
from compress.report.tables import Table
from compress.report.words import interval_words

HEAD = ("metric", "phase", "old", "new", "difference", "95 % interval", "outcome")


def worse(facts: AcrossFacts) -> list[ChangeFacts]:
    return changes.worse([row for rows in by_name(facts).values() for row in rows])


def by_name(facts: AcrossFacts) -> dict[str, list[ChangeFacts]]:
    """As the JSON calls them."""
    found = {"change": facts["change"]} if "change" in facts else {}
    return found | ({"against_result": facts["against_result"]["changes"]} if "against_result" in facts else {})


def tables(result: CheckFacts) -> list[Table]:
    """With the older artifact, and with the stored result."""
    found = []
    if "change" in result:
        found.append(Table(f"After {result['baseline']['name']}", HEAD, list(map(_cells, result["change"]))))
    if "against_result" in result:
        against = result["against_result"]
        title = f"After {against['candidate']}, of {against['file']}"
        found.append(Table(title, HEAD, list(map(_cells, against["changes"]))))
    return found


def show(title: str, rows: Sequence[ChangeFacts], console: Console) -> None:
    table = rich.table.Table(*HEAD[:-1], "", title=title, title_justify="left")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)


def _cells(row: ChangeFacts) -> list[str]:
    figures = (_words(row, row[key]) for key in ("old", "new", "difference"))
    return [row["metric"], row["phase"] or "", *figures, interval_words(row["low"], row["high"]), row["outcome"]]


def words(row: ChangeFacts) -> str:
    """Such as `1.2 after 1.1, difference 0.1 (0.05 to 0.15)`."""
    interval = interval_words(row["low"], row["high"])
    new, old, difference = (_words(row, row[key]) for key in ("new", "old", "difference"))
    return f"{new} after {old}, difference {difference}" + (f" ({interval})" if interval else "")


def _words(row: ChangeFacts, value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,}" if row["metric"] == "weight_bytes" else f"{value:.6g}"
