"""The survey as <svg> elements. Every figure that a colour shows stands beside it as text, where there is room."""

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from compress.studies import drawing
from compress.studies.experts import facts
from compress.studies.experts.findings import Layer, Loss
from compress.studies.experts.one_layer import DEFAULT_ROUTER

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

CELL_WIDTH, CELL_HEIGHT = 0.52, 0.32  # inches
LABELLED = 8  # experts up to which figures fit into a similarity matrix
SQUARE = 0.34  # inches that a cell of such a matrix takes
SIDE = 2.8  # inches of a whole matrix otherwise
PAGE_WIDTH = 11  # inches that small multiples share
FLOOR = 1e-9  # a loss that a logarithmic scale can still show
MARKERS = "osD^vP*X<>hp"
LINES = ("-", "--", "-.", ":")


def load(layers: list[Layer]) -> str:
    """Rows are layers, columns experts, figures per cent of all tokens."""
    from matplotlib.figure import Figure  # heavy, and only pages need it
    from matplotlib.ticker import FuncFormatter

    values = np.array([layer["share"] for layer in layers])
    inner = CELL_WIDTH * values.shape[1], CELL_HEIGHT * len(layers)
    with drawing.style():
        figure = Figure(figsize=(inner[0] + 1.2, inner[1] + 1.5))
        axes = _axes(figure, 0.9, 0.95, *inner)
        image = _cells(axes, values, _percent, "Blues", (0, values.max()))
        axes.set_yticks(range(len(layers)), [f"layer {layer['layer']}" for layer in layers])
        axes.set_xticks(range(values.shape[1]))
        axes.set_xlabel("expert")
        axes.xaxis.set_label_position("top")
        bar = _axes(figure, 0.9, 0.5, min(4.0, inner[0]), 0.15)
        _legend(figure, image, bar, "% of all tokens", format=FuncFormatter(lambda value, _: f"{100 * value:g}"))
        return drawing.svg(figure, "load-")


def _percent(share: float) -> str:
    return facts.percent(share).removesuffix(" %") if share else "dead"


def losses(layers: list[Layer], total: list[Loss]) -> str:
    """Predicted loss against experts kept: a curve per layer, told apart by marker and dashes too, and their sum."""
    from matplotlib.figure import Figure

    with drawing.style():
        figure = Figure(figsize=(8.5, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for layer, marker, line in zip(layers, cycle(MARKERS), cycle(LINES), strict=False):
            _curve(axes, layer["predicted"], label=f"layer {layer['layer']}", marker=marker, linestyle=line)
        _curve(axes, total, label="total", marker="*", markersize=10, color="black", linewidth=2.5)
        axes.set_yscale("log")
        axes.set_xticks([entry["kept"] for entry in total])
        axes.set_xlabel("experts kept in each layer")
        axes.set_ylabel(f"predicted loss ({DEFAULT_ROUTER})")
        axes.grid(color="#dddddd")
        figure.legend(loc="outside right upper")
        return drawing.svg(figure, "loss-")


def _curve(axes: "Axes", entries: Sequence[Loss], *, label: str, marker: str, linestyle: str = "-", markersize: float = 5,
           color: str | None = None, linewidth: float | None = None) -> None:  # fmt: skip
    losses = [max(FLOOR, entry["loss"][DEFAULT_ROUTER]) for entry in entries]
    axes.plot([entry["kept"] for entry in entries], losses, label=label, marker=marker, linestyle=linestyle,
              markersize=markersize, color=color, linewidth=linewidth)  # fmt: skip


def similarity(layers: list[Layer]) -> str:
    """A matrix per layer, all in one scale."""
    from matplotlib.figure import Figure

    experts = layers[0]["experts"]
    side = SQUARE * experts if experts <= LABELLED else SIDE
    across = min(len(layers), int(PAGE_WIDTH // (side + 0.4)))
    down = -(-len(layers) // across)
    height = down * (side + 0.6) + 0.7
    with drawing.style():
        figure = Figure(figsize=(max(4.0, across * (side + 0.4) + 0.2), height))
        for place, layer in enumerate(layers):
            row, column = divmod(place, across)
            axes = _axes(figure, 0.3 + column * (side + 0.4), height - (row + 1) * (side + 0.6) + 0.1, side, side)
            image = _matrix(axes, layer, side)
        bar = _axes(figure, 0.3, 0.42, 3.0, 0.12)
        _legend(figure, image, bar, "cosine of the experts' outputs", ticks=(-1, -0.5, 0, 0.5, 1))
        return drawing.svg(figure, "similarity-")


def _matrix(axes: "Axes", layer: Layer, side: float) -> "QuadMesh":
    experts = layer["experts"]
    text = _cosine if experts <= LABELLED else None
    image = _cells(axes, np.array(layer["similarity"]), text, "RdBu_r", (-1, 1), fontsize=6)
    ticks = range(0, experts, -(-experts // LABELLED))
    axes.set_yticks(ticks)
    axes.set_xticks(ticks)
    axes.set_title(f"layer {layer['layer']}", y=1 + 0.2 / side, weight="bold")
    return image


def _cosine(value: float) -> str:
    """Two digits, without a minus before zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _axes(figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
    """In inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def _legend(figure: "Figure", image: "QuadMesh", axes: "Axes", label: str, *, ticks: Sequence[float] | None = None,
            format: "Formatter | None" = None) -> None:  # fmt: skip
    figure.colorbar(image, cax=axes, orientation="horizontal", label=label, ticks=ticks, format=format)


def _cells(axes: "Axes", values: np.ndarray, text: Callable[[float], str] | None, cmap: str, limits: tuple[float, float],
           fontsize: float | None = None) -> "QuadMesh":  # fmt: skip
    """A heat map with its first row on top; `text` (None: none) says what a cell's value is."""
    edges = (np.arange(size + 1) - 0.5 for size in reversed(values.shape))
    image = axes.pcolormesh(
        *edges, values, cmap=cmap, vmin=limits[0], vmax=limits[1], edgecolors="white", linewidth=0.5
    )
    axes.invert_yaxis()
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    if text is None:
        return image
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column, row, text(value), ha="center", va="center", color=drawing.ink(image, value), fontsize=fontsize
        )
    return image
