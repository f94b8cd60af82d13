"""The heat map as one HTML file that needs nothing else: for each format a map, rows are layers, columns roles, colour is log10 KL."""

from collections.abc import Sequence
from pathlib import Path

from compress.report.html import heat, pages
from compress.report.html.heat import Cell, Heat, Logarithmic
from compress.report.tables import Table
from compress.studies import results
from compress.studies.sensitivity.findings import CellFound, Study, WorstTensor
from compress.studies.sensitivity.table import replaced

FLOOR = 1e-7  # nats: below it float32's own rounding shows
TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(result: Study, recipe: str) -> str:
    """The page of a study."""
    cells = result["cells"]
    scale = heat.logarithmic([cell["kl_divergence_mean"] for cell in cells], FLOOR)
    return pages.render(
        TEMPLATE, result=result, recipe=recipe, prompts=results.prompts_as_text(result["prompts"]), notes=replaced(cells),
        maps=maps(cells, scale), legend=scale.legend(heat.YELLOW_RED), worst=_worst(result["worst_tensors"]),
    )  # fmt: skip


def maps(cells: Sequence[CellFound], scale: Logarithmic) -> list[Heat]:
    """A map for each format, all with the same rows and columns: the roles that cost most come first."""
    rows = {cell["unit"]: "" if cell["kind"] == cell["unit"] else cell["kind"] for cell in cells}
    costliest = sorted(cells, key=lambda cell: -cell["kl_divergence_mean"])
    roles = list(dict.fromkeys(cell["role"] for cell in costliest))
    formats = dict.fromkeys(cell["format"] for cell in cells)
    return [
        heat.grid(name, _drawn([cell for cell in cells if cell["format"] == name], scale), rows, roles)
        for name in formats
    ]


def _drawn(cells: Sequence[CellFound], scale: Logarithmic) -> dict[tuple[str, str], Cell]:
    return {(cell["unit"], cell["role"]): _cell(cell, scale) for cell in cells}


def _cell(cell: CellFound, scale: Logarithmic) -> Cell:
    """A star where another format was stored in place of that asked for."""
    value, is_replaced = cell["kl_divergence_mean"], cell["stored"] != cell["format"]
    words = f"{cell['unit']}, {cell['role']} as {cell['stored']}: {value:.4g} nats, {cell['parameters']:,} parameters"
    return heat.cell(
        heat.small(value, FLOOR) + ("*" if is_replaced else ""), scale.share(value), heat.YELLOW_RED, words
    )


def _worst(tensors: Sequence[WorstTensor]) -> Table:
    rows = [[t["name"], t["format"], f"{t['kl_divergence_mean']:.3g}", f"{t['parameters']:,}"] for t in tensors]
    return Table("Worst tensors, in the recipe's formats", ("tensor", "format", "KL divergence", "parameters"), rows)
