"""What of a report is drawn. Each is None, or empty, where there is nothing to draw."""

from collections.abc import Mapping, Sequence

from compress.check.positions import PositionFacts
from compress.check.recall import RecallFacts
from compress.passes import Coverage, Trial
from compress.report import overview
from compress.report.html import charts, heat, scales
from compress.report.html.charts import Axis, Bars, Plot, Point, Series
from compress.report.html.heat import Heat
from compress.report.overview import Line
from compress.report.schema import Report
from compress.report.tables import number, span
from compress.report.words import interval_words

FLOOR = 1e-7  # nats: below it float32's own rounding shows


def size_against_quality(report: Report) -> Plot | None:
    """Artifacts and the original, which has no divergence; the limit where it is in sight."""
    found = [
        line for line in overview.lines(report, report["artifacts"]) if line.size and _divergence(line) is not None
    ]
    if not found:
        return None
    original = 8 * report["size"]["baseline_bytes"] / report["model"]["parameters"]
    series = [Series("original", [Point(original, 0.0, f"{original:.2f} bits, 0 nats")], 5, joined=False)]
    series += [Series(line.artifact, [_of_artifact(line)], place, joined=False) for place, line in enumerate(found)]
    limits = {row["limit"] for line in found if (row := line.figures["kl_divergence_mean"])["limit"] is not None}
    drawn = [(limit, f"limit {limit:g}") for limit in sorted(limits) if limit is not None]
    points = [point for one in series for point in one.points]
    x = Axis("bits per weight", scales.linear([point.x for point in points], from_zero=True))
    y = Axis(
        "mean KL divergence, nats", scales.linear([*(p.y for p in points), *(at for at, _ in drawn)], from_zero=True)
    )
    return charts.plot("Size against quality", x, y, series, drawn)


def _divergence(line: Line) -> float | None:
    row = line.figures.get("kl_divergence_mean")
    return None if row is None else row["value"]


def _of_artifact(line: Line) -> Point:
    row, size = line.figures["kl_divergence_mean"], line.size
    assert size is not None and row["value"] is not None  # as it was chosen
    bits, value = size["bits_per_weight"], max(0.0, row["value"])  # rounding may leave it just below
    return Point(bits, value, f"{bits:.2f} bits, {value:.3g} nats ({row['phase']})", row["low"], row["high"])


def divergence_by_position(rows: Sequence[PositionFacts]) -> Plot | None:
    """A line for each artifact and phase; decoding is dashed."""
    known = [row for row in rows if row["kl_divergence_mean"] is not None]
    if not known:
        return None
    places = sorted({(row["first"], row["last"]) for row in known})
    series = [
        Series(f"{artifact}, {phase}", [_of_position(row, places) for row in known if (row["artifact"], row["phase"]) == (artifact, phase)],
               _place(artifact, known), dashed=phase == "decode")
        for artifact, phase in dict.fromkeys((row["artifact"], row["phase"]) for row in known)
    ]  # fmt: skip
    ends = [end for one in series for point in one.points for end in (point.y, point.high) if end is not None]
    x = Axis("position in the window, from", scales.named([scales.short(first) for first, _ in places]))
    return charts.plot(
        "Divergence by position", x, Axis("mean KL divergence, nats", scales.linear(ends, from_zero=True)), series
    )


def _of_position(row: PositionFacts, places: Sequence[tuple[int, int]]) -> Point:
    value = row["kl_divergence_mean"]
    assert value is not None  # as it was chosen
    words = f"{span(row['first'], row['last'])}: {value:.3g} ({interval_words(row['low'], row['high'])})"
    return Point(places.index((row["first"], row["last"])), value, words, row["low"], row["high"])


def _place(artifact: str, rows: Sequence[PositionFacts] | Sequence[RecallFacts]) -> int:
    """A number for its colour."""
    return list(dict.fromkeys(row["artifact"] for row in rows)).index(artifact)


def recall_by_distance(rows: Sequence[RecallFacts]) -> Plot | None:
    """The share of questions answered, a line for each artifact and phase, and the original's."""
    if not rows:
        return None
    places = sorted({(row["first"], row["last"]) for row in rows})
    groups = {(row["artifact"], row["phase"]): [r for r in rows if (r["artifact"], r["phase"]) == (row["artifact"], row["phase"])]
              for row in rows}  # fmt: skip
    first = next(iter(groups.values()))
    series = [Series("original", [_of_distance(row, places, row["baseline_accuracy"]) for row in first], 5)]
    for (artifact, phase), found in groups.items():
        points = [_of_distance(row, places, row["candidate_accuracy"]) for row in found]
        series.append(Series(f"{artifact}, {phase}", points, _place(artifact, rows), dashed=phase == "decode"))
    x = Axis("tokens between fact and question", scales.named([scales.short(first) for first, _ in places]))
    return charts.plot("Recall by distance", x, Axis("share answered rightly", scales.linear([0.0, 1.0])), series)


def _of_distance(row: RecallFacts, places: Sequence[tuple[int, int]], share: float) -> Point:
    return Point(places.index((row["first"], row["last"])), share, f"{span(row['first'], row['last'])}: {share:.3f}")


def state_memory(report: Report) -> Plot | None:
    """Of one sequence, at each context; one line where nothing changed."""
    before, after = (
        report["state_memory"]["baseline"]["total"]["at"],
        report["state_memory"]["candidate"]["total"]["at"],
    )
    if not min([*before.values(), *after.values()], default=0):
        return None
    lines = {"original": before, "compressed": after} if before != after else {"original and compressed": after}
    series = [Series(name, _at(at), colour) for colour, (name, at) in zip((5, 0), lines.items(), strict=False)]
    y = scales.logarithmic([*before.values(), *after.values()], scales.bytes_words, base=4.0)
    x = Axis("tokens read", scales.named([scales.short(int(tokens)) for tokens in after]))
    return charts.plot("State memory by context", x, Axis("bytes of a sequence", y), series)


def _at(contexts: Mapping[str, int]) -> list[Point]:
    """Bytes by tokens read."""
    return [Point(n, size, f"{scales.short(int(t))}: {size:,} bytes") for n, (t, size) in enumerate(contexts.items())]


def expert_loads(coverage: Coverage | None) -> list[Bars]:
    """Calibration tokens of every expert, a plot for each layer."""
    if coverage is None:
        return []
    return [
        charts.bars(f"Layer {layer}", tokens, [f"expert {expert}: {count:,} tokens" for expert, count in enumerate(tokens)],
                    f"{min(tokens):,} to {max(tokens):,} tokens")
        for layer, tokens in coverage.loads.items() if tokens
    ]  # fmt: skip


def trials(found: Sequence[Trial]) -> Heat | None:
    """What single parts cost, each way in a column; the one that was chosen is marked."""
    if not found:
        return None
    scale = heat.logarithmic(
        [trial.kl_divergence_mean for trial in found if trial.kl_divergence_mean is not None], FLOOR
    )
    cells = {}
    for trial in found:
        value = float("inf") if trial.kl_divergence_mean is None else trial.kl_divergence_mean
        text = heat.small(value, FLOOR) + (" ✓" if trial.chosen else "")
        words = (
            f"{trial.part} as {trial.way}: {number(trial.kl_divergence_mean)} nats{', chosen' if trial.chosen else ''}"
        )
        cells[trial.part, trial.way] = heat.cell(text, scale.share(min(value, 1e9)), heat.YELLOW_RED, words)
    parts, ways = dict.fromkeys((trial.part for trial in found), ""), list(dict.fromkeys(trial.way for trial in found))
    return heat.grid("What single states cost", cells, parts, ways, legend=scale.legend(heat.YELLOW_RED))
