"""Where the results of `compress experts` go."""

from pathlib import Path

from compress import results
from compress.checkpoint.writer import write_text
from compress.experts import page, table


def write(result: dict, json_file: str | None, html_file: str | None) -> None:
    """Files appear whole or not at all; the table goes to stderr where JSON owns stdout."""
    results.put_json(result, json_file)
    table.show(result, stderr=json_file == results.STDOUT)
    if html_file is not None:  # last: drawing must not cost the figures
        write_text(Path(html_file), page.render(result))
