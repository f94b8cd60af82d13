"""What a reader must see first: what is wrong, by name, and one line for each artifact. Words are plain; who shows them escapes
them."""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from compress.check.audit import AuditFacts
from compress.check.changes import ChangeFacts
from compress.check.compare import ALL, FoundFacts, RowFacts, Verdict
from compress.check.layer_audit import LayerAuditFacts
from compress.recipe.check import METRICS, MetricName
from compress.report import changes
from compress.report.schema import ArtifactFacts
from compress.report.tables import Table
from compress.report.words import block_words, interval_words, is_unmeasured, settling_words, value_words, verdict_words

Kind = Literal["audit", "layer audit", "not finite", "missed", "worse", "undecided"]
FIGURES: dict[MetricName, str] = {
    "perplexity_ratio": "perplexity ratio",
    "kl_divergence_mean": "KL, nats",
    "top1_agreement": "same top-1",
}


class Failure(NamedTuple):
    """One thing that is not as it should be."""

    kind: Kind
    artifact: str
    subject: str  # a tensor, a block, a phase and metric
    words: str

    @property
    def sentence(self) -> str:
        return f"{self.artifact}: {self.subject}: {self.words}"


class Line(NamedTuple):
    """An artifact: its size where it was written here, each figure of the phase in which it is worse, and what came of it."""

    artifact: str
    size: ArtifactFacts | None
    figures: dict[MetricName, RowFacts]
    outcome: str


def verdict(decided: Verdict, found: FoundFacts, worse: Sequence[ChangeFacts] = ()) -> str:
    """The verdict alone where what is wrong is named beside it, else with its reason."""
    return decided.replace("_", " ") if failures(found, worse) else verdict_words(decided, found)


def failures(found: FoundFacts, worse: Sequence[ChangeFacts] = ()) -> list[Failure]:
    """Of each kind, tensors first, the worst first. `worse` is what an earlier artifact did better."""
    tensors = sorted((row for row in found["audit"] if not row["passed"]), key=excess, reverse=True)
    blocks = sorted((row for row in found["layer_audit"] if not row["passed"]), key=excess, reverse=True)
    rows = [row for row in found["checks"] if row["prompts"] == ALL]
    return [
        *(Failure("audit", row["artifact"], row["tensor"], audit_words(row)) for row in tensors),
        *(Failure("layer audit", row["artifact"], block_words(row), audit_words(row)) for row in blocks),
        *(_of_row("not finite", row) for row in rows if is_not_finite(row)),
        *(_of_row("missed", row) for row in rows if row["outcome"] == "missed" and not is_not_finite(row)),
        *(Failure("worse", "than before", f"{row['phase']} {row['metric']}", changes.words(row)) for row in worse),
        *(_of_row("undecided", row) for row in rows if row["outcome"] == "undecided"),
    ]


def excess(row: AuditFacts | LayerAuditFacts) -> float:
    """How many times the error that is expected at most; infinite where there is no telling."""
    error, most = row["relative_error"], row["expected_at_most"]
    if error is None or most is None:
        return float("inf") if not row["passed"] else 0.0
    if most == 0:
        return float("inf") if error > 0 else 0.0
    return error / most


def audit_words(row: AuditFacts | LayerAuditFacts) -> str:
    """Such as `relative error 0.21, expected at most 0.011`, or what the audit noted."""
    said = [row["note"]] if "note" in row else []
    if row["relative_error"] is not None:
        most = row["expected_at_most"]
        expected = "" if most is None else f", expected at most {most:.3g}"
        said.append(f"relative error {row['relative_error']:.3g}{expected}")
    return "; ".join(said)


def is_not_finite(row: RowFacts) -> bool:
    return row["value"] is None and not is_unmeasured(row)


def _of_row(kind: Kind, row: RowFacts) -> Failure:
    return Failure(kind, row["artifact"], f"{row['phase']} {row['metric']}", row_words(row))


def row_words(row: RowFacts) -> str:
    """The value with its interval, the limit, and what would settle it."""
    interval, limit = interval_words(row["low"], row["high"]), row["limit"]
    return (
        value_words(row)
        + (f" ({interval})" if interval else "")
        + ("" if limit is None else f", limit: {limit_words(row['metric'], limit)}")
        + (f"; {settling_words(row)}" if row["outcome"] == "undecided" else "")
    )


def limit_words(metric: MetricName, limit: float) -> str:
    return f"{'at most' if METRICS[metric].bound == 'above' else 'at least'} {limit:g}"


def reasons(found: FoundFacts, worse: Sequence[ChangeFacts] = ()) -> list[str]:
    """How many of each kind, as parts of a sentence."""
    kinds = [failure.kind for failure in failures(found)]
    rows = [row for row in found["checks"] if row["prompts"] == ALL]
    limits = sum(row["outcome"] is not None for row in rows)
    parts: list[tuple[Kind, int, str]] = [
        ("audit", len(found["audit"]), "tensors fail the weight audit"),
        ("layer audit", len(found["layer_audit"]), "blocks fail the layer audit"),
        ("not finite", len(rows), "figures are not finite"),
        ("missed", limits, "limits are missed"),
        ("undecided", limits, "limits are undecided"),
    ]
    said = [f"{count} of {of:,} {what}" for kind, of, what in parts if (count := kinds.count(kind))]
    return [*said, f"{len(worse)} figures are worse than before"] if worse else said


def artifacts(found: FoundFacts) -> list[str]:
    """Every artifact that something was found of."""
    rows = (*found["checks"], *found["audit"], *found["layer_audit"])
    return list(dict.fromkeys(str(row["artifact"]) for row in rows))


def lines(found: FoundFacts, written: Sequence[ArtifactFacts] = ()) -> list[Line]:
    """Of what was written, then of what was only checked."""
    failed, by_kind = failures(found), {facts["kind"]: facts for facts in written}
    names = dict.fromkeys([*by_kind, *artifacts(found)])
    return [Line(name, by_kind.get(name), _figures(found, name), _outcome(found, name, failed)) for name in names]


def _figures(found: FoundFacts, artifact: str) -> dict[MetricName, RowFacts]:
    worse: dict[MetricName, RowFacts] = {}
    for row in found["checks"]:
        metric = row["metric"]
        if row["artifact"] == artifact and row["prompts"] == ALL and metric in FIGURES:
            worse[metric] = max(worse.get(metric, row), row, key=_badness)
    return worse


def _badness(row: RowFacts) -> float:
    """Larger is worse."""
    if row["value"] is None:
        return float("inf")
    return row["value"] if METRICS[row["metric"]].bound == "above" else -row["value"]


def _outcome(found: FoundFacts, artifact: str, failed: Sequence[Failure]) -> str:
    """As verdicts are called, of this artifact alone."""
    kinds = {failure.kind for failure in failed if failure.artifact == artifact}
    if kinds:
        return "undecided" if kinds == {"undecided"} else "fail"
    limited = any(row["outcome"] == "held" for row in found["checks"] if row["artifact"] == artifact)
    return "pass" if limited else "not checked"


def table(found: FoundFacts, written: Sequence[ArtifactFacts] = ()) -> Table:
    """A row for each artifact."""
    sizes = ("bytes", "bits per weight") if written else ()
    figures = FIGURES if found["checks"] else {}
    head = ("artifact", "verdict", *sizes, *figures.values())
    return Table("Artifacts", head, [_cells(line, len(sizes), figures) for line in lines(found, written)])


def _cells(line: Line, sizes: int, metrics: Iterable[MetricName]) -> list[str]:
    size = ["", ""] if line.size is None else [f"{line.size['bytes']:,}", f"{line.size['bits_per_weight']:.2f}"]
    figures = [_figure(line.figures[metric]) if metric in line.figures else "" for metric in metrics]
    return [line.artifact, line.outcome, *size[:sizes], *figures]


def _figure(row: RowFacts) -> str:
    """The perplexity ratio with its interval; the table of all figures has that of the others."""
    interval = interval_words(row["low"], row["high"]) if row["metric"] == "perplexity_ratio" else ""
    return value_words(row) + (f" ({interval})" if interval else "")
