"""The heat map as one HTML file that needs nothing else: rows are layers, columns roles and formats, colour is log10 KL."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.studies import drawing
from compress.studies.sensitivity.findings import CellFound, Study
from compress.studies.sensitivity.table import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

FLOOR = 1e-7  # nats: below it float32's own rounding shows
TEMPLATE = Path(__file__).with_name("page.html.j2")
CELL_WIDTH, CELL_HEIGHT, ROLE_WIDTH = 0.62, 0.32, 1.15  # inches; a role's columns are at least ROLE_WIDTH together
MARGIN_LEFT, MARGIN_BOTTOM, CHARACTER = 1.0, 0.9, 0.07  # inches; the last is the width of a letter


def render(result: Study, recipe: str) -> str:
    """The page of a study."""
    cells = result["cells"]
    return drawing.render(TEMPLATE, result=result, recipe=recipe, svg=draw(cells), notes=replaced(cells))


class Grid:
    """Where each cell's figure stands: rows are units, columns are (role, format), a role's formats side by side."""

    def __init__(self, cells: list[CellFound]):
        self.units = list(dict.fromkeys(cell["unit"] for cell in cells))
        self.roles = list(dict.fromkeys(cell["role"] for cell in cells))
        self.formats = list(dict.fromkeys(cell["format"] for cell in cells))
        self.columns = [(role, name) for role in self.roles for name in self.formats]

    def place(self, cell: CellFound) -> tuple[int, int]:
        return self.units.index(cell["unit"]), self.columns.index((cell["role"], cell["format"]))


def draw(cells: list[CellFound]) -> str:
    """The map as an <svg> element."""
    from matplotlib.figure import Figure  # heavy, and only this needs it

    grid = Grid(cells)
    cell_width = max(CELL_WIDTH, ROLE_WIDTH / len(grid.formats))
    inner = cell_width * len(grid.columns), CELL_HEIGHT * len(grid.units)
    label_height = CHARACTER * max(map(len, grid.formats)) + 0.1
    width, height = MARGIN_LEFT + inner[0] + 0.2, MARGIN_BOTTOM + inner[1] + label_height + 0.3
    with drawing.style():
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((MARGIN_LEFT / width, MARGIN_BOTTOM / height, inner[0] / width, inner[1] / height))
        image = _paint(axes, grid, cells)
        _label(axes, grid, label_height)
        _legend(figure, image, width, height)
        return drawing.svg(figure)


def _paint(axes: "Axes", grid: Grid, cells: list[CellFound]) -> "QuadMesh":
    """Colours and figures; where a layer has no such role it stays grey."""
    logs = np.full((len(grid.units), len(grid.columns)), np.nan)
    for cell in cells:
        logs[grid.place(cell)] = np.log10(max(cell["kl_divergence_mean"], FLOOR))
    low, high = np.floor(np.nanmin(logs)), np.ceil(np.nanmax(logs))
    axes.set_facecolor("#eeeeee")
    edges = (np.arange(size + 1) - 0.5 for size in reversed(logs.shape))
    image = axes.pcolormesh(*edges, np.ma.masked_invalid(logs), cmap="YlOrRd", vmin=low, vmax=max(high, low + 1))
    axes.invert_yaxis()
    for cell in cells:
        row, column = grid.place(cell)
        color = drawing.ink(image, logs[row, column])
        star = "*" if cell["stored"] != cell["format"] else ""
        axes.text(column, row, _figure(cell["kl_divergence_mean"]) + star, ha="center", va="center", color=color)
    return image


def _figure(value: float) -> str:
    if value < FLOOR:
        return "<1e-7"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _label(axes: "Axes", grid: Grid, label_height: float) -> None:
    """Units on the left, formats on top and above them their role, a line between roles."""
    axes.set_yticks(range(len(grid.units)), grid.units)
    axes.set_xticks(range(len(grid.columns)), [name for _, name in grid.columns], rotation=90)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    for number, role in enumerate(grid.roles):
        start = number * len(grid.formats) - 0.5
        above = -0.5 - label_height / CELL_HEIGHT
        axes.text(start + len(grid.formats) / 2, above, role, ha="center", va="bottom", weight="bold")
        axes.axvline(start, color="#444444", linewidth=1)
    for row in range(1, len(grid.units)):
        axes.axhline(row - 0.5, color="white", linewidth=1)


def _legend(figure: "Figure", image: "QuadMesh", width: float, height: float) -> None:
    span = min(4.0, width - MARGIN_LEFT - 0.2)
    axes = figure.add_axes((MARGIN_LEFT / width, 0.5 / height, span / width, 0.15 / height))
    figure.colorbar(image, cax=axes, orientation="horizontal", label="log10 of the mean KL divergence, nats per token")
