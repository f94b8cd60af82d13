"""report.html: what report.md says and what plots say better, as one file for those who decide."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markupsafe import Markup

from compress.check.changes import ChangeFacts
from compress.check.compare import FoundFacts, Verdict
from compress.check.worst import WorstFacts
from compress.report import changes, findings, markdown, measures, overview, written
from compress.report.html import pages, plots
from compress.report.html.charts import Plot
from compress.report.html.heat import Heat
from compress.report.passes import PassDone
from compress.report.schema import CheckFacts, Report
from compress.report.tables import Table
from compress.report.words import notes

TEMPLATE = Path(__file__).with_name("report.html.j2")
FAILING = 20  # of an audit, that are shown unfolded
NAMED = 8  # things that are wrong, and are named on the first screen
COLOURS = {"pass": "good", "fail": "bad", "undecided": "warn", "not_checked": "muted"}
LETTERS = 2000  # of a text that is shown

PROSE = MarkdownIt("commonmark", {"html": False}).disable(["image", "link", "autolink"])


class Tile(NamedTuple):
    """A figure that is shown large."""

    figure: str
    about: str


class Pair(NamedTuple):
    """How two models go on with a text: what both say, and what each says then."""

    row: WorstFacts
    text: str
    both: str
    before: str
    after: str


def render(report: Report, done: Sequence[PassDone], strip: Heat | None, recipe: str) -> str:
    """Of `apply`."""
    coverages = [coverage for step in done if (coverage := step.step.coverage(step.details))]
    tried = [trial for step in done for trial in step.step.trials(step.details)]
    drawn = [plots.size_against_quality(report), *_drawn(report), plots.state_memory(report)]
    return pages.render(
        TEMPLATE, **_common(report, report["model"]["name"], report["verdict"]), changed=[], tiles=_tiles(report), strip=strip,
        artifacts=overview.table(report, report["artifacts"]), plots=[one for one in drawn if one],
        loads=plots.expert_loads(coverages[-1] if coverages else None), trials=plots.trials(tried),
        written=[written.artifacts(report), written.engines(report), written.states(report)], notes=_notes(report),
        passes=Markup(PROSE.render("\n".join(markdown.pass_lines(report, done)))), recipe=recipe,
        prompts=report["prompts"], versions=report["versions"],
    )  # fmt: skip


def render_check(result: CheckFacts) -> str:
    """Of `check`."""
    name = f"{result['candidate']} against {result['baseline']['name']}"
    return pages.render(
        TEMPLATE, **_common(result, name, result["verdict"], changes.worse(result)), changed=changes.tables(result),
        artifacts=overview.table(result), plots=[one for one in _drawn(result) if one], tiles=[], strip=None, loads=[],
        trials=None, written=[], notes=[], passes="", recipe="", prompts=result["prompts"], versions=result["versions"],
    )  # fmt: skip


def _drawn(found: FoundFacts) -> list[Plot | None]:
    return [plots.divergence_by_position(found["by_position"]), plots.recall_by_distance(found["recall"])]


def _common(found: FoundFacts, name: str, verdict: Verdict, worse: Sequence[ChangeFacts] = ()) -> dict[str, object]:
    failed = overview.failures(found, worse)
    audits = [findings.audit(found["audit"]), findings.layer_audit(found["layer_audit"])]
    return {
        "name": name,
        "verdict": overview.verdict(verdict, found, worse),
        "colour": COLOURS.get(verdict, "muted"),
        "reasons": overview.reasons(found, worse),
        "failures": failed[:NAMED],
        "more": max(0, len(failed) - NAMED),
        "remarks": found["remarks"],
        "audits": [table for table in audits if table.rows],
        "failing": [few for table in audits if (few := _failing(table)).rows],
        "pairs": [_pair(row) for row in found["worst_prompts"]],
        "tables": [
            measures.checks(found["checks"]), findings.flips(found["flips"]), findings.tasks(found["tasks"]),
            measures.by_position(found["by_position"]), measures.recall(found["recall"]),
            measures.states(found["state_health"], found["state_saturation"]), measures.generated(found["generated"]),
        ],
        "said": notes(found["checks"]),
    }  # fmt: skip


def _failing(audit: Table) -> Table:
    """What is wrong, which stands first; the rest is a click away."""
    failed = sum("fails" in cells for cells in audit.rows[:FAILING])
    return Table(audit.title, audit.head, audit.rows[:failed], audit.bars[:failed])


def _pair(row: WorstFacts) -> Pair:
    before, after = row["baseline_text"] or "", row["candidate_text"] or ""
    same = next(
        (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )
    cut = [_cut(text) for text in (row["text"] or "", before[:same], before[same:], after[same:])]
    return Pair(row, *cut)


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} ..."


def _tiles(report: Report) -> list[Tile]:
    size, model, at = report["size"], report["model"], report["state_memory"]["candidate"]["total"]["at"]
    ratio = size["candidate_bytes"] / size["baseline_bytes"]
    context, state = next(iter(at.items()))
    return [
        Tile(f"{size['candidate_bytes']:,}", f"bytes of weights, of {size['baseline_bytes']:,} before"),
        Tile(f"{ratio:.3f}", "of the original's bytes"),
        Tile(f"{size['bits_per_weight']:.2f}", "bits per weight of the original"),
        Tile(f"{model['parameters']:,}", f"parameters, {model['active_parameters']:,} active ({model['model_type']})"),
        Tile(f"{state:,}", f"bytes of state a sequence at {int(context):,} tokens"),
    ]


def _notes(report: Report) -> list[str]:
    return [f"{facts['kind']}: {note}" for facts in report["artifacts"] for note in facts.get("notes", [])]
