"""The survey as <svg> elements. Every figure that a colour shows stands beside it as text, where there is room."""

from itertools import cycle

import numpy as np

from compress import drawing
from compress.experts import facts
from compress.experts.layer import DEFAULT_ROUTER

CELL_WIDTH, CELL_HEIGHT = 0.52, 0.32  # inches
SQUARE, SMALL_SQUARE, LABELLED = 0.34, 0.12, 16  # of a similarity matrix; with figures in it up to so many experts
PAGE_WIDTH = 11  # inches that small multiples share
FLOOR = 1e-9  # a loss that a logarithmic scale can still show
MARKERS = "osD^vP*X<>hp"
LINES = ("-", "--", "-.", ":")


def load(layers: list[dict]) -> str:
    """Rows are layers, columns experts, figures per cent of all tokens."""
    from matplotlib import rc_context  # heavy, and only pages need it
    from matplotlib.figure import Figure

    rows, columns = len(layers), max(layer["experts"] for layer in layers)
    inner = CELL_WIDTH * columns, CELL_HEIGHT * rows
    width, height = inner[0] + 1.2, inner[1] + 1.5
    values = np.array([layer["share"] for layer in layers])
    with rc_context(drawing.STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0.9 / width, 0.95 / height, inner[0] / width, inner[1] / height))
        image = _cells(axes, values, _percent, "Blues", (0, values.max()))
        axes.set_yticks(range(rows), [f"layer {layer['layer']}" for layer in layers])
        axes.set_xticks(range(columns))
        axes.set_xlabel("expert")
        axes.xaxis.set_label_position("top")
        bar = figure.add_axes((0.9 / width, 0.5 / height, min(4.0, inner[0]) / width, 0.15 / height))
        label = "% of all tokens"
        figure.colorbar(
            image, cax=bar, orientation="horizontal", label=label, format=lambda value, _: f"{100 * value:g}"
        )
        return drawing.svg(figure, "load-")


def _percent(share: float) -> str:
    return facts.percent(share).removesuffix(" %") if share else "dead"


def losses(layers: list[dict], total: list[dict]) -> str:
    """Predicted loss against experts kept: a curve per layer, told apart by marker and dashes too, and their sum."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(drawing.STYLE):
        figure = Figure(figsize=(8.5, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for layer, marker, line in zip(layers, cycle(MARKERS), cycle(LINES), strict=False):
            _curve(axes, layer["predicted"], label=f"layer {layer['layer']}", marker=marker, linestyle=line)
        _curve(axes, total, label="total", marker="s", color="black", linewidth=2.5)
        axes.set_yscale("log")
        axes.set_xticks([entry["kept"] for entry in total])
        axes.set_xlabel("experts kept in each layer")
        axes.set_ylabel(f"predicted loss ({DEFAULT_ROUTER})")
        axes.grid(color="#dddddd")
        figure.legend(loc="outside right upper")
        return drawing.svg(figure, "loss-")


def _curve(axes, entries: list[dict], **style) -> None:
    losses = [max(FLOOR, entry["loss"][DEFAULT_ROUTER]) for entry in entries]
    axes.plot([entry["kept"] for entry in entries], losses, markersize=5, **style)


def similarity(layers: list[dict]) -> str:
    """A matrix per layer, all in one scale."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    experts = max(layer["experts"] for layer in layers)
    side = experts * (SQUARE if experts <= LABELLED else SMALL_SQUARE)
    across = min(len(layers), max(1, int(PAGE_WIDTH // (side + 0.4))))
    down = -(-len(layers) // across)
    width, height = max(4.0, across * (side + 0.4) + 0.2), down * (side + 0.6) + 0.7
    with rc_context(drawing.STYLE):
        figure = Figure(figsize=(width, height))
        for place, layer in enumerate(layers):
            row, column = divmod(place, across)
            left, bottom = 0.3 + column * (side + 0.4), height - (row + 1) * (side + 0.6) + 0.1
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            image = _matrix(axes, layer)
        bar = figure.add_axes((0.3 / width, 0.42 / height, 3.0 / width, 0.12 / height))
        label = "cosine of the experts' outputs"
        figure.colorbar(image, cax=bar, orientation="horizontal", label=label, ticks=(-1, -0.5, 0, 0.5, 1))
        return drawing.svg(figure, "similarity-")


def _matrix(axes, layer: dict):
    experts = layer["experts"]
    text = _cosine if experts <= LABELLED else None
    image = _cells(axes, np.array(layer["similarity"]), text, "RdBu_r", (-1, 1), fontsize=6)
    ticks = range(0, experts, -(-experts // LABELLED))
    axes.set_yticks(ticks)
    axes.set_xticks(ticks)
    axes.set_title(f"layer {layer['layer']}", y=1 + 0.2 / (experts * SQUARE), weight="bold")
    return image


def _cosine(value: float) -> str:
    """Two digits, without a minus before zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def _cells(axes, values: np.ndarray, text, cmap: str, limits: tuple[float, float], **style):
    """A heat map with its first row on top; `text` (None: none) says what a cell's value is."""
    edges = (np.arange(size + 1) - 0.5 for size in reversed(values.shape))
    image = axes.pcolormesh(
        *edges, values, cmap=cmap, vmin=limits[0], vmax=limits[1], edgecolors="white", linewidth=0.5
    )
    axes.invert_yaxis()
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for (row, column), value in np.ndenumerate(values) if text else ():
        axes.text(column, row, text(value), ha="center", va="center", color=drawing.ink(image, value), **style)
    return image
