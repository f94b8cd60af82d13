"""The survey as one HTML file that needs nothing else: plots, and every figure in tables."""

from pathlib import Path

from compress import drawing, results
from compress.experts import facts, plots
from compress.experts.layer import ROUTERS
from compress.pruning import scores

TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(result: dict) -> str:
    """The page for what `run` returned."""
    layers, total = result["layers"], result["total"]
    svgs = {
        "load": plots.load(layers),
        "losses": plots.losses(layers, total) if total else "",
        "similarity": plots.similarity(layers),
    }
    return drawing.render(
        TEMPLATE, result=result, prompts=results.prompts_as_text(result["prompts"]), warnings=facts.warnings(result),
        svgs=svgs, facts=facts, routers=ROUTERS, score_names=scores.NAMES,
    )  # fmt: skip
