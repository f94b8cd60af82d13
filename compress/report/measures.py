"""What a check measured, as tables: figures, along the window, by distance, of states, of generated texts."""

from collections.abc import Sequence

from compress.check.compare import RowFacts
from compress.check.generated import GeneratedFacts
from compress.check.positions import PositionFacts
from compress.check.recall import RecallFacts
from compress.check.states import HealthFacts, SaturationFacts
from compress.report.tables import Table, known, number, span
from compress.report.words import interval_words, outcome_words, value_words


def checks(rows: Sequence[RowFacts]) -> Table:
    outcomes = [row["outcome"] for row in rows if row["outcome"]]
    counts = ", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes)) or "no limits were set"
    head = ("artifact", "phase", "prompts", "metric", "value", "95 % interval", "limit", "outcome")
    return Table(f"All {len(rows)} figures: {counts}", head, [_of_figure(row) for row in rows])


def _of_figure(row: RowFacts) -> list[str]:
    name = [row["artifact"], row["phase"], row["prompts"], row["metric"]]
    limit = "" if row["limit"] is None else f"{row['limit']:g}"
    return [*name, value_words(row), interval_words(row["low"], row["high"]), limit, outcome_words(row)]


def by_position(rows: Sequence[PositionFacts]) -> Table:
    head = ("artifact", "phase", "positions", "KL mean", "95 % interval", "perplexity before", "after")
    return Table("Divergence by position", head, [_of_positions(row) for row in rows])


def _of_positions(row: PositionFacts) -> list[str]:
    figures = [number(row["kl_divergence_mean"]), interval_words(row["low"], row["high"])]
    perplexities = [number(row["baseline_perplexity"]), number(row["candidate_perplexity"])]
    return [row["artifact"], row["phase"], span(row["first"], row["last"]), *figures, *perplexities]


def recall(rows: Sequence[RecallFacts]) -> Table:
    head = ("artifact", "phase", "distance", "questions", "right before", "after", "drop", "95 % interval")
    return Table("Recall by distance", head, [_of_distance(row) for row in rows])


def _of_distance(row: RecallFacts) -> list[str]:
    rates = [f"{row[key]:.4f}" for key in ("baseline_accuracy", "candidate_accuracy", "drop")]
    asked = [span(row["first"], row["last"]), str(row["trials"])]
    return [row["artifact"], row["phase"], *asked, *rates, interval_words(row["low"], row["high"])]


def states(health: Sequence[HealthFacts], saturation: Sequence[SaturationFacts]) -> Table:
    """A row for each layer and kind: how much larger it is at each position than the original's, and what saturates."""
    positions = sorted({row["position"] for row in health})
    head = ("artifact", "layer", "kind", "RMS before", *(f"ratio at {position}" for position in positions), "saturated")
    rows: dict[tuple[str, int, str], list[HealthFacts]] = {}
    for row in health:
        rows.setdefault((row["artifact"], row["layer"], row["kind"]), []).append(row)
    title = "States: root mean square against the original's, and saturation"
    return Table(title, head, [_of_states(found, positions, saturation) for found in rows.values()])


def _of_states(
    rows: Sequence[HealthFacts], positions: Sequence[int], saturation: Sequence[SaturationFacts]
) -> list[str]:
    """`RMS before` is the original's at the last position."""
    ratios = {row["position"]: number(row["ratio"]) for row in rows}
    name = [rows[0]["artifact"], str(rows[0]["layer"]), rows[0]["kind"]]
    counts = [c for c in saturation if [c["artifact"], str(c["layer"]), c["kind"]] == name]
    shares = ", ".join(f"{c['share']:.3g}" + (" (dynamic)" if "note" in c else "") for c in counts)
    return [*name, number(rows[-1]["baseline_rms"]), *(ratios.get(place, "") for place in positions), shares]


def generated(rows: Sequence[GeneratedFacts]) -> Table:
    head = ("artifact", "figure", "texts", "before", "after", "value", "95 % interval")
    return Table("Generated texts", head, [_of_texts(row) for row in rows])


def _of_texts(row: GeneratedFacts) -> list[str]:
    figures = [known(row[key]) for key in ("baseline", "candidate", "value")]
    name = [row["artifact"], row["figure"].replace("_", " "), str(row["texts"])]
    return [*name, *figures, interval_words(row["low"], row["high"])]
