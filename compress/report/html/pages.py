"""A page from its template. What it shows comes from files and models: it is escaped, and characters that steer are made visible."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from compress.report.html import charts, heat
from compress.report.tables import Table
from compress.terminal.escaping import printable

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent
MOST = 400  # rows of a table that are shown; the JSON has every one


def render(template: Path, **values: object) -> str:
    """The template may extend `base.html.j2` and use what `parts.html.j2` has; what it names and is not given is an error."""
    environment = _environment(template.parent)
    return environment.get_template(template.name).render(values)


@cache
def _environment(folder: Path) -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # heavy, and only pages need it

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader([folder, FOLDER]), finalize=_visible,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "charts": charts,
        "heat": heat,
        "most": MOST,
        "css": _file("page.css"),
        "js": _file("page.js"),
    }
    environment.globals |= {"is_alarming": Table.is_alarming, "is_number": is_number}
    return environment


def _visible(value: object) -> object:
    """Markup is our own; text keeps its lines."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def _file(name: str) -> Markup:
    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def is_number(text: str) -> bool:
    """Whether a cell stands with numbers: such as `1,024`, `0.0031`, `-0.5 to 0.2`, `64-255`."""
    return bool(text) and (text[0].isdigit() or (len(text) > 1 and text[0] in "+-<" and text[1].isdigit()))
