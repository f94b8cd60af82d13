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
    words = verdict.replace("_", " ")
    if verdict == "not_checked" and rows:
        return f"{words}, no limits were set"
    return f"{words}, not every figure is finite" if any(row["value"] is None for row in rows) else words


def value_words(row: RowFacts) -> str:
    return "not finite" if row["value"] is None else f"{row['value']:.6g}"


def show_rows(rows: Sequence[RowFacts], console: Console) -> None:
    """The rows over all prompts."""
    if not rows:
        return
    table = Table("artifact", "phase", "metric", "value", "limit", "")
    for row in (row for row in rows if row["prompts"] == ALL):
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        mark = {None: "", True: "held", False: "missed"}[row["passed"]]
        table.add_row(row["artifact"], row["phase"], row["metric"], value_words(row), limit, mark)
    console.print(table)
