"""The end of a run on the terminal: the verdict, the rows that had limits, where things are."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from compress.check import engines
from compress.check.compare import ALL, FoundFacts, RowFacts, Verdict
from compress.check.tasks import TaskFacts
from compress.output_folder import build_facts
from compress.output_folder.build_facts import BuildFacts
from compress.report import overview
from compress.report.schema import Report
from compress.report.words import interval_words, is_shown, notes, outcome_words, value_words, verdict_words
from compress.terminal import output, progress
from compress.terminal.exits import MISSED

NAMED = 8  # of what an audit found


def exit_code(verdict: Verdict, on_undecided: Literal["fail", "pass"]) -> int:
    """That of `apply` and `check`."""
    return MISSED if verdict == "fail" or (verdict == "undecided" and on_undecided == "fail") else 0


def show(report: Report, out: Path, code: int) -> None:
    """On stdout: it is the result; the reason of an exit code that is not 0 also on stderr."""
    console = output.console(stderr=False)
    size = report["size"]
    console.print(
        f"{report['model']['name']}: {size['baseline_bytes']:,} -> {size['candidate_bytes']:,} bytes of weights, "
        f"{size['bits_per_weight']:.2f} bits per weight"
    )
    coverage = report["calibration"].get("expert_coverage") if "calibration" in report else None
    if coverage and (cold := coverage["experts_below_threshold"]):
        console.print(f"calibration: {len(cold)} experts {coverage['below_threshold']}")
    show_found(report, console)
    last = f"verdict: {verdict_words(report['verdict'], report)}   {out}/report.md"
    console.print(last)
    if code and not sys.stdout.isatty():
        progress.note(last)


def show_build(facts: BuildFacts) -> int:
    """On stderr, as an export has no other result than what it wrote; the exit code."""
    progress.note(build_facts.sentence(facts))
    for name in facts["widened"][:NAMED]:
        progress.note(f"{name}: {engines.widened_words(name, facts)}")
    if (more := len(facts["widened"]) - NAMED) > 0:
        progress.note(f"and {more} more that were widened")
    return MISSED if facts["widened"] else 0


def show_found(found: FoundFacts, console: Console) -> None:
    """The rows over all prompts that have limits or are looked at first, and what is to be said of them."""
    if rows := [row for row in found["checks"] if row["prompts"] == ALL and is_shown(row)]:
        _show_rows(rows, console)
    for sentence in (*notes(found["checks"]), *map(_task_words, found["tasks"]), *found["remarks"], *_audited(found)):
        console.print(sentence)


def _audited(found: FoundFacts) -> Iterator[str]:
    """What the audit found, the worst first."""
    named = [failure.sentence for failure in overview.failures(found) if failure.kind in ("audit", "layer audit")]
    yield from named[:NAMED]
    if len(named) > NAMED:
        yield f"and {len(named) - NAMED} more that the audit found"


def _task_words(row: TaskFacts) -> str:
    accuracies = f"{row['baseline_accuracy']:.4g} -> {row['candidate_accuracy']:.4g}"
    flips = f"{row['only_baseline']} lost, {row['only_candidate']} gained (McNemar p {row['p_value']:.2g})"
    kind = row["kind"].replace("_", " ")
    return f"{row['artifact']}: {row['task']}, {kind}: {accuracies} of {row['items']} items right, {flips}"


def _show_rows(rows: Sequence[RowFacts], console: Console) -> None:
    table = Table("artifact", "phase", "metric", "value", "95 % interval", "limit", "")
    for row in rows:
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        interval = interval_words(row["low"], row["high"])
        table.add_row(
            row["artifact"], row["phase"], row["metric"], value_words(row), interval, limit, outcome_words(row)
        )
    console.print(table)
