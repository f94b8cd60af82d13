"""Plots as SVG: where every line, dot and label stands. `parts.html.j2` writes them down.

A plot is 360 wide in its own units, which a phone shows at about their size, so that its text can be read there.
"""

from collections.abc import Sequence
from typing import NamedTuple

from compress.report.html.scales import Scale

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
COLOURS = 6  # that the style has for lines


class Point(NamedTuple):
    """`low` and `high` are the ends of its interval. `words` are what it shows when it is pointed at."""

    x: float
    y: float
    words: str
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """Points that a line joins, where `joined`. Colours count from 0; a strong one is thick, in the colour of text."""

    name: str
    points: Sequence[Point]
    colour: int
    dashed: bool = False
    joined: bool = True
    strong: bool = False


class Dot(NamedTuple):
    x: float
    y: float
    words: str


class Curve(NamedTuple):
    """What is drawn of a series; `path` and `band` are in SVG's words, empty where there is nothing to draw."""

    name: str
    looks: str  # the classes of its colour and stroke
    path: str
    band: str
    dots: list[Dot]


class Mark(NamedTuple):
    """A tick, or a line across the plot, with its label."""

    place: float
    label: str


class Plot(NamedTuple):
    title: str
    x_title: str
    y_title: str
    x_ticks: list[Mark]
    y_ticks: list[Mark]
    limits: list[Mark]
    curves: list[Curve]

    @property
    def summary(self) -> str:
        """For those who do not see it."""
        return f"{self.title}: {self.y_title} by {self.x_title}. " + "; ".join(
            f"{curve.name}: {', '.join(dot.words for dot in curve.dots)}" for curve in self.curves
        )


class Axis(NamedTuple):
    title: str
    scale: Scale


def plot(title: str, x: Axis, y: Axis, series: Sequence[Series], limits: Sequence[tuple[float, str]] = ()) -> Plot:
    """Lines over both axes; a limit is a line across."""
    return Plot(
        title,
        x.title,
        y.title,
        [Mark(_across(x.scale.place(value)), label) for value, label in x.scale.ticks],
        [Mark(_up(y.scale.place(value)), label) for value, label in y.scale.ticks],
        [Mark(_up(y.scale.place(value)), label) for value, label in limits],
        [_curve(one, x.scale, y.scale) for one in series],
    )


def _across(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _up(share: float) -> float:
    return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def _curve(series: Series, x: Scale, y: Scale) -> Curve:
    dots = [Dot(_across(x.place(p.x)), _up(y.place(p.y)), p.words) for p in series.points]
    path = _path([(dot.x, dot.y) for dot in dots]) if series.joined and len(dots) > 1 else ""
    return Curve(series.name, _looks(series), path, _band(series.points, x, y), dots)


def _looks(series: Series) -> str:
    colour = "strong" if series.strong else f"c{series.colour % COLOURS + 1}"
    return f"{colour} dashed" if series.dashed else colour


def _band(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """Along the upper ends and back along the lower ones; a single interval is a stroke."""
    ends = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    upper = [(_across(x.place(at)), _up(y.place(high))) for at, _, high in ends]
    lower = [(_across(x.place(at)), _up(y.place(low))) for at, low, _ in reversed(ends)]
    if len(ends) == 1:
        (at, top), (_, bottom) = upper[0], lower[0]
        upper, lower = [(at - 1.5, top), (at + 1.5, top)], [(at + 1.5, bottom), (at - 1.5, bottom)]
    return f"{_path([*upper, *lower])}Z" if ends else ""


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


class Bars(NamedTuple):
    """Heights 0 .. 1 with what each shows when it is pointed at, beside each other."""

    title: str
    heights: list[tuple[float, str]]
    note: str


def bars(title: str, values: Sequence[float], words: Sequence[str], note: str) -> Bars:
    most = max(values, default=0) or 1
    return Bars(title, [(value / most, said) for value, said in zip(values, words, strict=True)], note)
