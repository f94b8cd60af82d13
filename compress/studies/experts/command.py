"""Where the results of `compress experts` go."""

from compress.studies import results
from compress.studies.experts import page, table
from compress.studies.experts.findings import Survey


def write(result: Survey, json_file: str | None, html_file: str | None) -> None:
    """Files appear whole or not at all; the table goes to stderr where JSON owns stdout."""
    results.put_json(result, json_file)
    table.show(result, stderr=json_file == results.STDOUT)
    if html_file is not None:  # last: drawing must not cost the figures
        results.put_text(page.render(result), html_file)
