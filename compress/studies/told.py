"""Where the results of `compress check` go."""

from typing import NamedTuple

from compress.report import changes, junit, markdown, step_summary
from compress.report.html import report_page
from compress.report.junit import OnUndecided
from compress.report.schema import CheckFacts
from compress.studies import results


class Targets(NamedTuple):
    """Files, or None; what cannot be written is refused before the work."""

    json: str | None
    html: str | None
    junit: str | None


def refuse_unwritable(targets: Targets) -> None:
    results.refuse_unwritable(targets.json, targets.html, targets.junit)


def write(result: CheckFacts, targets: Targets, on_undecided: OnUndecided, *, worse_fails: bool) -> None:
    """Files appear whole or not at all."""
    results.put_json(result, targets.json)
    if targets.junit is not None:
        changed = changes.by_name(result) if worse_fails else {}
        results.put_text(junit.render(result["candidate"], result, (), on_undecided, changed), targets.junit)
    if targets.html is not None:
        results.put_text(report_page.render_check(result), targets.html)
    step_summary.append(markdown.render_check(result))
