"""What a check found beside its figures, as folded tables of report.md: the audit, flips, prompts, tasks."""

from collections.abc import Sequence
from typing import TypeVar

from compress.check.audit import AuditFacts
from compress.check.flips import FlipFacts
from compress.check.layer_audit import LayerAuditFacts
from compress.check.tasks import TaskFacts
from compress.check.worst import WorstFacts
from compress.report import folded
from compress.report.overview import block_words, excess
from compress.report.terminal import interval_words
from compress.terminal.escaping import code_cell, markdown

MOST = 40  # rows of an audit that are shown: all that fail come first, report.json has every one
LETTERS = 300  # of a text in a cell

Row = TypeVar("Row", AuditFacts, LayerAuditFacts)


def audit(rows: Sequence[AuditFacts]) -> str:
    head = ("artifact", "tensor", "format", "relative error", "expected at most", "")
    return _judged("Weight audit", "tensors", head, rows, [_of_tensor(row) for row in worst_first(rows)])


def layer_audit(rows: Sequence[LayerAuditFacts]) -> str:
    head = ("artifact", "block", "tokens", "relative error", "expected at most", "")
    return _judged("Layer audit", "blocks", head, rows, [_of_block(row) for row in worst_first(rows)])


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """What fails, then what came closest to it."""
    return sorted(rows, key=lambda row: (row["passed"], -excess(row)))


def _judged(
    title: str, what: str, head: Sequence[str], rows: Sequence[AuditFacts | LayerAuditFacts], cells: list[list[str]]
) -> str:
    if not rows:
        return ""
    failed = sum(not row["passed"] for row in rows)
    shown = folded.table(head, cells[:MOST])
    rest = f"\n\nThe other {len(cells) - MOST:,} rows are in the JSON." if len(cells) > MOST else ""
    return folded.section(f"{title}: {failed or 'none'} of {len(rows):,} {what} fail", shown + rest)


def _of_tensor(row: AuditFacts) -> list[str]:
    return [markdown(row["artifact"]), code_cell(row["tensor"]), markdown(row["format"]), *_errors(row)]


def _of_block(row: LayerAuditFacts) -> list[str]:
    return [markdown(row["artifact"]), markdown(block_words(row)), f"{row['tokens']:,}", *_errors(row)]


def _errors(row: AuditFacts | LayerAuditFacts) -> list[str]:
    figures = ["" if row[key] is None else f"{row[key]:.3g}" for key in ("relative_error", "expected_at_most")]
    said = markdown(row["note"]) if "note" in row else ""
    return [*figures, said if row["passed"] else f"**fails** {said}".rstrip()]


def flips(rows: Sequence[FlipFacts]) -> str:
    """Of each artifact, phase and set: positions at which one of the two models has the text's token on top."""
    head = ("artifact", "phase", "prompts", "positions", "only the original right", "only the candidate", "McNemar p")
    cells = [[markdown(row["artifact"]), row["phase"], markdown(row["prompts"]), f"{row['positions']:,}",
              f"{row['only_baseline']:,}", f"{row['only_candidate']:,}", f"{row['p_value']:.3g}"] for row in rows]  # fmt: skip
    return folded.section("Flips: who has the text's next token on top", folded.table(head, cells)) if rows else ""


def worst_prompts(rows: Sequence[WorstFacts]) -> str:
    if not rows:
        return ""
    head = (
        "artifact",
        "phase",
        "prompts",
        "window",
        "KL mean",
        "text",
        "the original goes on",
        "the candidate goes on",
    )
    cells = [[markdown(row["artifact"]), row["phase"], markdown(row["prompts"]), str(row["window"]),
              number(row["kl_divergence_mean"]), *map(_text, texts(row))] for row in rows]  # fmt: skip
    return folded.section(f"Worst prompts: the {len(rows)} windows that change most", folded.table(head, cells))


def texts(row: WorstFacts) -> tuple[str | None, str | None, str | None]:
    return row["text"], row["baseline_text"], row["candidate_text"]


def _text(text: str | None) -> str:
    words = " ".join((text or "").split())
    return markdown(words if len(words) <= LETTERS else f"{words[:LETTERS]} ...")


def tasks(rows: Sequence[TaskFacts]) -> str:
    if not rows:
        return ""
    head = ("artifact", "task", "items", "right before", "after", "change", "95 % interval", "lost", "won", "McNemar p")
    return folded.section(f"Tasks: {len(rows)} rows", folded.table(head, [_of_task(row) for row in rows]))


def _of_task(row: TaskFacts) -> list[str]:
    shares = [f"{row['baseline_accuracy']:.4f}", f"{row['candidate_accuracy']:.4f}", f"{row['change']:+.4f}"]
    flipped = [str(row["only_baseline"]), str(row["only_candidate"]), f"{row['p_value']:.3g}"]
    name = [markdown(row["artifact"]), markdown(row["task"]), f"{row['items']:,}"]
    return [*name, *shares, interval_words(row["low"], row["high"]), *flipped]


def number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
