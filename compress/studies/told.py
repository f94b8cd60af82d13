"""Where the results of `compress check` go."""

from compress.report import junit, markdown, step_summary
from compress.report.html import report_page
from compress.report.junit import OnUndecided
from compress.report.schema import CheckFacts
from compress.studies import results


def write(
    result: CheckFacts, on_undecided: OnUndecided, json_file: str | None, html_file: str | None, junit_file: str | None
) -> None:
    """Files appear whole or not at all."""
    results.put_json(result, json_file)
    if junit_file is not None:
        results.put_text(junit.render(result["candidate"], result, (), on_undecided), junit_file)
    if html_file is not None:
        results.put_text(report_page.render_check(result), html_file)
    step_summary.append(markdown.render_check(result))
