"""What a check measured along the window and by distance, as folded tables of report.md."""

from collections.abc import Sequence

from compress.check.generated import GeneratedFacts
from compress.check.positions import PositionFacts
from compress.check.recall import RecallFacts
from compress.check.states import HealthFacts, SaturationFacts
from compress.report import folded
from compress.report.terminal import interval_words
from compress.terminal.escaping import markdown


def by_position(rows: Sequence[PositionFacts]) -> str:
    """Empty where nothing was measured, as the next."""
    head = ("artifact", "phase", "positions", "KL mean", "95 % interval", "perplexity before", "after")
    return _folded("Divergence by position", head, [_of_positions(row) for row in rows])


def recall(rows: Sequence[RecallFacts]) -> str:
    head = ("artifact", "phase", "distance", "questions", "right before", "after", "drop", "95 % interval")
    return _folded("Recall by distance", head, [_of_distance(row) for row in rows])


def states(health: Sequence[HealthFacts], saturation: Sequence[SaturationFacts]) -> str:
    """A row for each layer and kind: how much larger it is at each position than the original's, and what saturates."""
    positions = sorted({row["position"] for row in health})
    head = ("artifact", "layer", "kind", "RMS before", *(f"ratio at {position}" for position in positions), "saturated")
    rows: dict[tuple[str, int, str], list[HealthFacts]] = {}
    for row in health:
        rows.setdefault((row["artifact"], row["layer"], row["kind"]), []).append(row)
    lines = [_of_states(found, positions, saturation) for found in rows.values()]
    return _folded("States: root mean square against the original's, and saturation", head, lines)


def _of_states(
    rows: Sequence[HealthFacts], positions: Sequence[int], saturation: Sequence[SaturationFacts]
) -> list[str]:
    """`RMS before` is the original's at the last position."""
    ratios = {row["position"]: _number(row["ratio"]) for row in rows}
    name = [rows[0]["artifact"], str(rows[0]["layer"]), rows[0]["kind"]]
    counts = [c for c in saturation if [c["artifact"], str(c["layer"]), c["kind"]] == name]
    shares = ", ".join(f"{c['share']:.3g}" + (" (dynamic)" if "note" in c else "") for c in counts)
    return [*name, _number(rows[-1]["baseline_rms"]), *(ratios.get(place, "") for place in positions), shares]


def generated(rows: Sequence[GeneratedFacts]) -> str:
    head = ("artifact", "figure", "texts", "before", "after", "value", "95 % interval")
    return _folded("Generated texts", head, [_of_texts(row) for row in rows])


def _of_texts(row: GeneratedFacts) -> list[str]:
    figures = ["" if row[key] is None else f"{row[key]:.4g}" for key in ("baseline", "candidate", "value")]
    name = [row["artifact"], row["figure"].replace("_", " "), str(row["texts"])]
    return [*name, *figures, interval_words(row["low"], row["high"])]


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
    return folded.section(title, folded.table(head, [list(map(markdown, cells)) for cells in rows])) if rows else ""
