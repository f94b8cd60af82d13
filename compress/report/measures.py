"""What a check measured along the window and by distance, as folded tables of report.md."""

from collections.abc import Sequence

from compress.check.positions import PositionFacts
from compress.check.recall import RecallFacts
from compress.report.terminal import interval_words


def by_position(rows: Sequence[PositionFacts]) -> str:
    """Empty where nothing was measured, as the next."""
    head = ("artifact", "phase", "positions", "KL mean", "95 % interval", "perplexity before", "after")
    return _folded("Divergence by position", head, [_of_positions(row) for row in rows])


def recall(rows: Sequence[RecallFacts]) -> str:
    head = ("artifact", "phase", "distance", "questions", "right before", "after", "drop", "95 % interval")
    return _folded("Recall by distance", head, [_of_distance(row) for row in rows])


def _of_positions(row: PositionFacts) -> list[str]:
    figures = [_number(row["kl_divergence_mean"]), interval_words(row["low"], row["high"])]
    perplexities = [_number(row["baseline_perplexity"]), _number(row["candidate_perplexity"])]
    return [row["artifact"], row["phase"], _range(row["first"], row["last"]), *figures, *perplexities]


def _of_distance(row: RecallFacts) -> list[str]:
    rates = [f"{row[key]:.4f}" for key in ("baseline_accuracy", "candidate_accuracy", "drop")]
    asked = [_range(row["first"], row["last"]), str(row["trials"])]
    return [row["artifact"], row["phase"], *asked, *rates, interval_words(row["low"], row["high"])]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _folded(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join([f"<details><summary>{title}</summary>\n", *lines, "\n</details>\n"])
