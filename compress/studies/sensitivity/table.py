"""The figures on the terminal: a row per kind of layer and role, a column per format, the worst tensors below."""

from rich.table import Table

from compress.studies import results
from compress.studies.sensitivity.findings import CellFound, Study, WorstTensor
from compress.terminal import output


def show(result: Study, *, stderr: bool) -> None:
    console = output.console(stderr=stderr)
    used = results.prompts_as_text(result["prompts"])
    console.print(f"{result['model']['name']}: mean KL divergence, nats per token, of quantizing one part at a time")
    console.print(f"on {used}; a figure is the sum over layers, (N) the layer that costs most of it")
    console.print(_cells(result["cells"]))
    for line in replaced(result["cells"]):
        console.print(line)
    console.print(_worst(result["worst_tensors"]))


def _cells(cells: list[CellFound]) -> Table:
    formats = list(dict.fromkeys(cell["format"] for cell in cells))
    table = Table("kind", "role", *formats)
    for kind, role in dict.fromkeys((cell["kind"], cell["role"]) for cell in cells):
        row = [cell for cell in cells if (cell["kind"], cell["role"]) == (kind, role)]
        table.add_row(kind, role, *(_summed([cell for cell in row if cell["format"] == name]) for name in formats))
    return table


def _summed(cells: list[CellFound]) -> str:
    """`0.00123 (4)`; a star where another format was stored in place of that asked for."""
    total = sum(cell["kl_divergence_mean"] for cell in cells)
    worst = max(cells, key=lambda cell: cell["kl_divergence_mean"])
    where = "" if worst["layer"] is None else f" ({worst['layer']})"
    return f"{total:.3g}{where}{'*' if any(cell['stored'] != cell['format'] for cell in cells) else ''}"


def replaced(cells: list[CellFound]) -> list[str]:
    """A sentence for every format that did not fit somewhere, and what was measured in its place."""
    found: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell["stored"] != cell["format"]:
            found.setdefault((cell["format"], cell["stored"]), []).append(cell["role"])
    return [
        f"* {asked} does not divide the inputs of {', '.join(dict.fromkeys(roles))}: measured as {stored}"
        for (asked, stored), roles in found.items()
    ]


def _worst(tensors: list[WorstTensor]) -> Table:
    table = Table("worst tensors, in the recipe's formats", "format", "KL divergence", "parameters")
    for tensor in tensors:
        figure = f"{tensor['kl_divergence_mean']:.3g}"
        table.add_row(tensor["name"], tensor["format"], figure, f"{tensor['parameters']:,}")
    return table
