"""The end of a run on the terminal: the verdict, the rows that had limits, where things are."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from compress.check.compare import ALL, RowFacts
from compress.report.schema import Report
from compress.terminal import output, progress

GOOD = ("pass", "not_checked")  # verdicts that end with exit code 0


def show(report: Report, out: Path) -> None:
    """On stdout: it is the result."""
    console = output.console(stderr=False)
    size = report["size"]
    console.print(
        f"{report['model']['name']}: {size['baseline_bytes']:,} -> {size['candidate_bytes']:,} bytes of weights, "
        f"{size['bits_per_weight']:.2f} bits per weight"
    )
    coverage = report["calibration"].get("expert_coverage") if "calibration" in report else None
    if coverage and (cold := coverage["experts_below_threshold"]):
        console.print(f"calibration: {len(cold)} experts {coverage['below_threshold']}")
    show_rows(report["checks"], console)
    last = f"verdict: {verdict_words(report['verdict'], report['checks'])}   {out}/report.md"
    console.print(last)
    if report["verdict"] not in GOOD and not sys.stdout.isatty():
        progress.note(last)  # as with every exit code but 0, stderr says why


def verdict_words(verdict: str, rows: Sequence[RowFacts]) -> str:
    """The verdict of a report or of a check's result, and why, where no row tells."""
    words, unmeasured = verdict.replace("_", " "), [row for row in rows if is_unmeasured(row)]
    if any(row["value"] is None and not is_unmeasured(row) for row in rows):
        return f"{words}, not every figure is finite"
    if unmeasured:
        return f"{words}, {unmeasured[0]['metric']} could not be measured"
    return f"{words}, no limits were set" if verdict == "not_checked" and rows else words


def is_unmeasured(row: RowFacts) -> bool:
    """Whether a limit asks for what the prompts do not tell."""
    return row["value"] is None and row["positions"] == 0


def value_words(row: RowFacts) -> str:
    if row["value"] is None:
        return "not measured" if is_unmeasured(row) else "not finite"
    return f"{row['value']:.6g}"


def interval_words(low: float | None, high: float | None) -> str:
    """The 95 % interval; empty where there is none."""
    return "" if low is None or high is None else f"{low:.5g} to {high:.5g}"


def notes(rows: Sequence[RowFacts]) -> list[str]:
    """What rows over all prompts say beside their value, each sentence once."""
    said: dict[str, None] = {}
    for row in rows:
        if row["prompts"] == ALL and "note" in row:
            said[f"{row['metric']}: {row['note']}" if is_unmeasured(row) else f"intervals: {row['note']}"] = None
    return list(said)


def show_rows(rows: Sequence[RowFacts], console: Console) -> None:
    """The rows over all prompts."""
    if not rows:
        return
    table = Table("artifact", "phase", "metric", "value", "95 % interval", "limit", "")
    for row in (row for row in rows if row["prompts"] == ALL):
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        mark = {None: "", True: "held", False: "missed"}[row["passed"]]
        interval = interval_words(row["low"], row["high"])
        table.add_row(row["artifact"], row["phase"], row["metric"], value_words(row), interval, limit, mark)
    console.print(table)
    for note in notes(rows):
        console.print(note)
