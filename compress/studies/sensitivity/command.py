"""Where the results of `compress sensitivity` go."""

from compress.studies import results
from compress.studies.sensitivity import heatmap, table
from compress.studies.sensitivity.findings import Study


def write(result: Study, recipe: str, json_file: str | None, html_file: str | None) -> None:
    """Files appear whole or not at all; the table goes to stderr where JSON owns stdout."""
    results.put_json(result, json_file)
    table.show(result, stderr=json_file == results.STDOUT)
    if html_file is not None:  # last: drawing must not cost the figures
        results.put_text(heatmap.render(result, recipe), html_file)
