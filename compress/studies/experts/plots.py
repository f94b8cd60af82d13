"""The survey as plots and maps. Every figure that a colour shows stands beside it as text, where there is room."""

from collections.abc import Sequence
from typing import NamedTuple

from compress.report.html import charts, heat, picture, scales
from compress.report.html.charts import Axis, Plot, Point, Series
from compress.report.html.heat import Cell, Heat
from compress.studies.experts import facts
from compress.studies.experts.findings import Layer, Loss
from compress.studies.experts.one_layer import DEFAULT_ROUTER

LABELLED = 8  # experts up to which figures fit into a similarity matrix
FLOOR = 1e-9  # a loss that a logarithmic scale can still show
MIDDLE = 0.5  # of the map of cosines, where 0 is


class Picture(NamedTuple):
    """A matrix of more experts than figures fit in: its image, and what that shows in words."""

    title: str
    address: str
    words: str


def load(layers: Sequence[Layer]) -> Heat:
    """Rows are layers, columns experts, figures per cent of all tokens."""
    most = max(max(layer["share"]) for layer in layers) or 1
    cells = {
        (_label(layer), str(expert)): heat.cell(_percent(share), share / most, heat.BLUES, f"{layer['tokens'][expert]:,} tokens")
        for layer in layers for expert, share in enumerate(layer["share"])
    }  # fmt: skip
    columns = [str(expert) for expert in range(max(layer["experts"] for layer in layers))]
    rows = {_label(layer): "" for layer in layers}
    return heat.grid("% of all tokens, by layer and expert", cells, rows, columns)


def _label(layer: Layer) -> str:
    return f"layer {layer['layer']}"


def _percent(share: float) -> str:
    return facts.percent(share).removesuffix(" %") if share else "dead"


def losses(layers: Sequence[Layer], total: Sequence[Loss]) -> Plot | None:
    """Predicted loss against experts kept: a curve per layer, and their sum."""
    if not total:
        return None
    kept = sorted(entry["kept"] for entry in total)
    series = [Series(_label(layer), _curve(layer["predicted"], kept), place, dashed=place // charts.COLOURS % 2 == 1)
              for place, layer in enumerate(layers)]  # fmt: skip
    series.append(Series("total", _curve(total, kept), 0, strong=True))
    y = scales.logarithmic([point.y for one in series for point in one.points], lambda value: f"{value:.0e}")
    x = Axis("experts kept in each layer", scales.named([str(count) for count in kept]))
    return charts.plot("Predicted loss", x, Axis(f"predicted loss ({DEFAULT_ROUTER})", y), series)


def _curve(entries: Sequence[Loss], kept: Sequence[int]) -> list[Point]:
    found = {entry["kept"]: entry["loss"][DEFAULT_ROUTER] for entry in entries}
    return [
        Point(place, max(FLOOR, found[count]), f"{count} kept: {found[count]:.3g}") for place, count in enumerate(kept)
    ]


def similarity(layers: Sequence[Layer]) -> list[Heat | Picture]:
    """A matrix per layer, all in one scale."""
    return [_matrix(layer) if layer["experts"] <= LABELLED else _picture(layer) for layer in layers]


def _matrix(layer: Layer) -> Heat:
    names = [str(expert) for expert in range(layer["experts"])]
    cells = {
        (names[a], names[b]): _cell(a, b, value)
        for a, row in enumerate(layer["similarity"])
        for b, value in enumerate(row)
    }
    return heat.grid(_label(layer), cells, dict.fromkeys(names, ""), names)


def _cell(first: int, second: int, cosine: float) -> Cell:
    """Two digits, without a minus before zero."""
    text = f"{round(cosine, 2) + 0.0:.2f}"
    return heat.cell(text, _share(cosine), heat.RED_BLUE, f"experts {first} and {second}: {text}")


def _share(cosine: float) -> float:
    return MIDDLE * (1 + cosine)


def _picture(layer: Layer) -> Picture:
    first, second, cosine = facts.most_similar(layer)
    words = f"{_label(layer)}: most alike are experts {first} and {second}, at {cosine:.2f}"
    return Picture(
        _label(layer), picture.of([[_share(v) for v in row] for row in layer["similarity"]], heat.RED_BLUE), words
    )


def cosines() -> list[Cell]:
    """What the colours of matrices mean."""
    return [heat.cell(f"{cosine:g}", _share(cosine), heat.RED_BLUE) for cosine in (-1, -0.5, 0, 0.5, 1)]
