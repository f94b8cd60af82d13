"""What pages with plots share: matplotlib's style, plots as <svg> elements, templates."""

import io
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

STYLE: "dict[RcKeyType, str | int | list[str]]" = {
    "svg.fonttype": "none",  # text stays text: it can be searched and copied
    "svg.hashsalt": "compress",  # the same figures give the same file
    "font.family": ["sans-serif"],
    "font.size": 8,
}


def style() -> AbstractContextManager[None]:
    """Figures made within have it."""
    from matplotlib import rc_context  # heavy, and only pages need it

    return rc_context(STYLE)


def svg(figure: "Figure", prefix: str = "") -> str:
    """Without the XML prologue and the metadata, which name addresses on the network. Several plots on one page need a
    `prefix` each, so that no id is there twice."""
    buffer = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=none, facecolor="white")
    text = buffer.getvalue()
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}", text[text.index("<svg") :])


def ink(image: "QuadMesh", value: float) -> str:
    """The colour of text that can be read on a cell of this value."""
    red, green, blue, _ = image.to_rgba(np.array([value]))[0]
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"


def render(template: Path, **values: object) -> str:
    """A page from its template; what the template names and is not given is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(values)
