"""What a check found beside its figures, as tables: the audit, flips, prompts, tasks."""

from collections.abc import Sequence

from compress.check.audit import AuditFacts
from compress.check.flips import FlipFacts
from compress.check.layer_audit import LayerAuditFacts
from compress.check.tasks import TaskFacts
from compress.check.worst import WorstFacts
from compress.report.overview import excess
from compress.report.tables import Table, known, number, one_line
from compress.report.words import block_words, interval_words

BRIEF = 40  # rows of an audit: what fails comes first
LETTERS = 300  # of a text in a cell


def audit(rows: Sequence[AuditFacts]) -> Table:
    """What fails first, then what came closest to it, with how much of what is expected at most."""
    found = sorted(rows, key=_by_excess)
    head = ("artifact", "tensor", "format", "relative error", "expected at most", "outcome", "note")
    cells = [[row["artifact"], row["tensor"], row["format"], *_judged(row)] for row in found]
    return Table(_title("Weight audit", "tensors", rows), head, cells, list(map(excess, found)), BRIEF)


def layer_audit(rows: Sequence[LayerAuditFacts]) -> Table:
    found = sorted(rows, key=_by_excess)
    head = ("artifact", "block", "tokens", "relative error", "expected at most", "outcome", "note")
    cells = [[row["artifact"], block_words(row), f"{row['tokens']:,}", *_judged(row)] for row in found]
    return Table(_title("Layer audit", "blocks", rows), head, cells, list(map(excess, found)), BRIEF)


def _by_excess(row: AuditFacts | LayerAuditFacts) -> tuple[bool, float]:
    return row["passed"], -excess(row)


def _title(audit: str, what: str, rows: Sequence[AuditFacts | LayerAuditFacts]) -> str:
    failed = sum(not row["passed"] for row in rows)
    return f"{audit}: {failed or 'none'} of {len(rows):,} {what} {'fails' if failed == 1 else 'fail'}"


def _judged(row: AuditFacts | LayerAuditFacts) -> list[str]:
    figures = [known(row["relative_error"]), known(row["expected_at_most"])]
    return [*figures, "held" if row["passed"] else "fails", row.get("note", "")]


def flips(rows: Sequence[FlipFacts]) -> Table:
    """Of each artifact, phase and set: positions at which one of the two models has the text's token on top."""
    head = ("artifact", "phase", "prompts", "positions", "only the original right", "only the candidate", "McNemar p")
    cells = [[row["artifact"], row["phase"], row["prompts"], f"{row['positions']:,}", f"{row['only_baseline']:,}",
              f"{row['only_candidate']:,}", f"{row['p_value']:.3g}"] for row in rows]  # fmt: skip
    return Table("Flips: who has the text's next token on top", head, cells)


def worst_prompts(rows: Sequence[WorstFacts]) -> Table:
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
    return Table(f"Worst prompts: the {len(rows)} windows that change most", head, [_of_window(row) for row in rows])


def _of_window(row: WorstFacts) -> list[str]:
    name = [row["artifact"], row["phase"], row["prompts"], str(row["window"]), number(row["kl_divergence_mean"])]
    texts = (row["text"], row["baseline_text"], row["candidate_text"])
    return [*name, *(one_line(text, LETTERS) for text in texts)]


def tasks(rows: Sequence[TaskFacts]) -> Table:
    head = ("artifact", "task", "items", "right before", "after", "change", "95 % interval", "lost", "won", "McNemar p")
    return Table(f"Tasks: {len(rows)}", head, [_of_task(row) for row in rows])


def _of_task(row: TaskFacts) -> list[str]:
    shares = [f"{row['baseline_accuracy']:.4f}", f"{row['candidate_accuracy']:.4f}", f"{row['change']:+.4f}"]
    flipped = [str(row["only_baseline"]), str(row["only_candidate"]), f"{row['p_value']:.3g}"]
    return [
        row["artifact"],
        row["task"],
        f"{row['items']:,}",
        *shares,
        interval_words(row["low"], row["high"]),
        *flipped,
    ]
