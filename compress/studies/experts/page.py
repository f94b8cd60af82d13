"""The survey as one HTML file that needs nothing else: plots, and every figure in tables."""

from collections.abc import Sequence
from pathlib import Path

from compress.passes.pruning import scores
from compress.report.html import pages
from compress.report.tables import Table
from compress.studies import results
from compress.studies.experts import facts, plots
from compress.studies.experts.findings import Layer, Loss, Predicted, Survey
from compress.studies.experts.one_layer import ROUTERS

TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(result: Survey) -> str:
    """The page of a survey."""
    layers, total = result["layers"], result["total"]
    return pages.render(
        TEMPLATE, result=result, prompts=results.prompts_as_text(result["prompts"]), warnings=facts.warnings(result),
        load=plots.load(layers), losses=plots.losses(layers, total), similarity=plots.similarity(layers),
        cosines=plots.cosines(), loss_tables=_losses(layers, total), score_tables=list(map(_scores, layers)), facts=facts,
    )  # fmt: skip


def _losses(layers: Sequence[Layer], total: Sequence[Loss]) -> list[Table]:
    """Of all layers together, then of each."""
    head = ("experts kept", *ROUTERS)
    together = Table("All layers together", head, [_loss(entry) for entry in total])
    return [
        together,
        *(Table(f"Layer {one['layer']}", (*head, "which"), list(map(_predicted, one["predicted"]))) for one in layers),
    ]


def _loss(entry: Loss) -> list[str]:
    return [str(entry["kept"]), *(f"{entry['loss'][router]:.3g}" for router in ROUTERS)]


def _predicted(entry: Predicted) -> list[str]:
    return [*_loss(entry), ", ".join(map(str, entry["experts"]))]


def _scores(layer: Layer) -> Table:
    head = ("expert", "tokens", "share", *scores.NAMES, "most like")
    return Table(f"Layer {layer['layer']}", head, [_expert(layer, expert) for expert in range(layer["experts"])])


def _expert(layer: Layer, expert: int) -> list[str]:
    other, cosine = facts.likest(layer, expert)
    tokens = f"{layer['tokens'][expert]:,}" + (" (dead)" if expert in layer["dead"] else "")
    figures = [f"{layer['scores'][name][expert]:.3g}" for name in scores.NAMES]
    return [str(expert), tokens, facts.percent(layer["share"][expert]), *figures, f"{other} ({cosine:.2f})"]
