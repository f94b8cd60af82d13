"""The survey as one HTML file that needs nothing else: plots, and every figure in tables."""

from pathlib import Path

from compress.passes.pruning import scores
from compress.studies import drawing, results
from compress.studies.experts import facts, plots
from compress.studies.experts.findings import Survey
from compress.studies.experts.one_layer import ROUTERS

TEMPLATE = Path(__file__).with_name("page.html.j2")


def render(result: Survey) -> str:
    """The page of a survey."""
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
