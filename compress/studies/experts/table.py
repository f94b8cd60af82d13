"""The survey on the terminal: a row per layer, a column per number of experts kept, then what the figures mean."""

from collections.abc import Sequence

from rich.table import Table

from compress.studies import results
from compress.studies.experts import facts
from compress.studies.experts.findings import Layer, Loss, Survey
from compress.studies.experts.one_layer import DEFAULT_ROUTER
from compress.terminal import output

COLUMNS = 7  # numbers of experts kept that are shown at most
MEANING = (
    "keep N: the predicted loss with the N experts of a layer that are best kept, the rest removed and the output rescaled.\n"
    "It is the squared change relative to the hidden state the layer leaves, |change|^2 / |h|^2, averaged over tokens:\n"
    "0.01 is a hundredth. Least squares, which prune_experts adds unless told otherwise, makes it smaller."
)
NOTHING = (
    "no expert can be removed: a layer must keep two, and as many as a token goes to,\n"
    "and all where they are chosen from groups of equal size"
)


def show(result: Survey, *, stderr: bool) -> None:
    console = output.console(stderr=stderr)
    layer = result["layers"][0]
    console.print(f"{result['model']['name']}: its experts on {results.prompts_as_text(result['prompts'])};")
    console.print(f"every MoE layer sends a token to {layer['top_k']} of its {layer['experts']} experts")
    counts = shown([entry["kept"] for entry in result["total"]])
    console.print(_table(result, counts))
    for line in (MEANING if counts else NOTHING).splitlines():
        console.print(line)
    if len(counts) < len(result["total"]):
        console.print("The table leaves out some numbers of experts; --json and --html have all.")
    for warning in facts.warnings(result):
        console.print(warning)


def shown(counts: list[int]) -> list[int]:
    """At most COLUMNS of them, evenly chosen, the first and the last among them."""
    if len(counts) <= COLUMNS:
        return counts
    return [counts[round(place * (len(counts) - 1) / (COLUMNS - 1))] for place in range(COLUMNS)]


def _table(result: Survey, counts: list[int]) -> Table:
    table = Table("layer", "least used", "most used", "dead", "most alike", *(f"keep {count}" for count in counts))
    for layer in result["layers"]:
        table.add_row(*_facts(layer), *_losses(layer["predicted"], counts))
    table.add_section()
    table.add_row("total", "", "", str(sum(len(layer["dead"]) for layer in result["layers"])), "",
                  *_losses(result["total"], counts))  # fmt: skip
    return table


def _facts(layer: Layer) -> list[str]:
    least, *_, most = facts.by_load(layer)
    first, second, cosine = facts.most_similar(layer)
    used = [f"{expert}: {facts.percent(layer['share'][expert])}" for expert in (least, most)]
    return [str(layer["layer"]), *used, str(len(layer["dead"])), f"{first} and {second}: {cosine:.2f}"]


def _losses(entries: Sequence[Loss], counts: list[int]) -> list[str]:
    by_count = {entry["kept"]: entry["loss"][DEFAULT_ROUTER] for entry in entries}
    return [f"{by_count[count]:.3g}" for count in counts]
