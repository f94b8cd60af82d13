"""Tables whose cells have colours: a figure stands in each, so that nothing is told by colour alone."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# stops of ColorBrewer's maps, light to dark
YELLOW_RED = ("#ffffcc", "#fed976", "#fd8d3c", "#e31a1c", "#800026")
BLUES = ("#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b")
RED_BLUE = ("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b")


class Cell(NamedTuple):
    """`words` are shown when it is pointed at. Without a colour it is empty."""

    text: str
    colour: str = ""
    ink: str = ""
    words: str = ""


EMPTY = Cell("")


class Row(NamedTuple):
    """`kind` stands beside the label."""

    label: str
    cells: Sequence[Cell]
    kind: str = ""


class Heat(NamedTuple):
    """A column has a label above, and may have another above that."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    above: Sequence[str] = ()
    legend: Sequence[Cell] = ()


def cell(text: str, share: float, stops: Sequence[str], words: str = "") -> Cell:
    """Of a value that lies so far, 0 .. 1, between the ends of the map."""
    colour = between(stops, share)
    return Cell(text, "#" + "".join(f"{part:02x}" for part in colour), _ink(colour), words)


def between(stops: Sequence[str], share: float) -> tuple[int, int, int]:
    """Red, green and blue of a place, 0 .. 1, in a map."""
    place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
    first = min(int(place), len(stops) - 2)
    begin, end = (tuple(int(stops[n][at : at + 2], 16) for at in (1, 3, 5)) for n in (first, first + 1))
    red, green, blue = (round(a + (b - a) * (place - first)) for a, b in zip(begin, end, strict=True))
    return red, green, blue


def _ink(colour: tuple[int, int, int]) -> str:
    """Whichever of black and white has more contrast (WCAG's relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"


class Logarithmic(NamedTuple):
    """From values to shares of a map that begins and ends at powers of ten; what is below `floor` counts as it."""

    low: int
    high: int
    floor: float

    def share(self, value: float) -> float:
        return (math.log10(max(value, self.floor)) - self.low) / (self.high - self.low)

    def legend(self, stops: Sequence[str]) -> list[Cell]:
        """A cell for each power of ten."""
        powers = range(self.low, self.high + 1)
        return [cell(f"1e{power}", (power - self.low) / (self.high - self.low), stops) for power in powers]


def logarithmic(values: Sequence[float], floor: float) -> Logarithmic:
    logs = [math.log10(max(value, floor)) for value in values if math.isfinite(value)] or [0.0]
    low = math.floor(min(logs))
    return Logarithmic(low, max(math.ceil(max(logs)), low + 1), floor)


def small(value: float, floor: float) -> str:
    """Two digits with their power of ten, such as `3.1e-4`."""
    if not math.isfinite(value):
        return "not finite"
    if value < floor:
        return f"<{floor:.0e}".replace("e-0", "e-")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def grid(
    title: str, cells: Mapping[tuple[str, str], Cell], rows: Mapping[str, str], columns: Sequence[str],
    above: Sequence[str] = (), legend: Sequence[Cell] = (),
) -> Heat:  # fmt: skip
    """By (row, column); a place that has none is empty. `rows` have their kinds, `above` stands over the columns."""
    found = [Row(row, [cells.get((row, column), EMPTY) for column in columns], kind) for row, kind in rows.items()]
    return Heat(title, columns, found, above, legend)
