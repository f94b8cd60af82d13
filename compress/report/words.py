"""What became of limits and of a whole check, in words."""

from collections.abc import Iterator, Sequence

from compress.check.compare import ALL, FoundFacts, RowFacts, Verdict
from compress.check.layer_audit import LayerAuditFacts
from compress.recipe.check import METRICS


def verdict_words(verdict: Verdict, found: FoundFacts) -> str:
    """The verdict of a report or of a check's result, and why: what failed first, then what is undecided."""
    reasons = list(_reasons(found))
    if verdict == "not_checked" and found["checks"] and not reasons:
        reasons = ["no limits were set"]
    return ", ".join(filter(None, (verdict.replace("_", " "), "; ".join(reasons))))


def _reasons(found: FoundFacts) -> Iterator[str]:
    rows = found["checks"]
    damaged = [f"{row['tensor']} ({row['artifact']})" for row in found["audit"] if not row["passed"]]
    damaged += [f"{block_words(row)} ({row['artifact']})" for row in found["layer_audit"] if not row["passed"]]
    if damaged:
        yield f"the audit found {_first_of(damaged)}"
    if any(row["value"] is None and not is_unmeasured(row) for row in rows):
        yield "not every figure is finite"
    if missed := [_named(row) for row in rows if row["outcome"] == "missed" and row["value"] is not None]:
        yield f"missed {_first_of(missed)}"
    if undecided := [_named(row) for row in rows if row["outcome"] == "undecided"]:
        yield f"too little text to settle {_first_of(undecided)}"
    if unmeasured := [row["metric"] for row in rows if is_unmeasured(row)]:
        yield f"{unmeasured[0]} could not be measured"


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _named(row: RowFacts) -> str:
    return f"{row['metric']} ({row['artifact']}, {row['phase']}: {value_words(row)}, limit {row['limit']:g})"


def outcome_words(row: RowFacts) -> str:
    """What became of a row's limit, and of one that is undecided how much text would settle it."""
    return f"undecided ({settling_words(row)})" if row["outcome"] == "undecided" else row["outcome"] or ""


def settling_words(row: RowFacts) -> str:
    """How much more text would settle what is undecided, or why none would."""
    if (more := row["more_tokens"]) is not None:
        return f"about {float(f'{more:.2g}'):,.0f} more tokens would settle it"
    return "the value is the limit, which no amount of text would settle" if row["low"] is not None else "no interval"


def is_unmeasured(row: RowFacts) -> bool:
    """Whether a limit asks for what the prompts do not tell."""
    return row["value"] is None and row["positions"] == 0


def value_words(row: RowFacts) -> str:
    if row["value"] is None:
        return "not measured" if is_unmeasured(row) else "not finite"
    return f"{row['value']:.6g}"


def interval_words(low: float | None, high: float | None) -> str:
    """The 95 % interval; empty where there is none."""
    return "" if low is None or high is None else f"{low:.5g} to {high:.5g}"


def notes(rows: Sequence[RowFacts]) -> list[str]:
    """What rows over all prompts say beside their value, each sentence once."""
    said: dict[str, None] = {}
    for row in rows:
        if row["prompts"] == ALL and "note" in row:
            said[f"{row['metric']}: {row['note']}" if is_unmeasured(row) else f"intervals: {row['note']}"] = None
    return list(said)


def block_words(row: LayerAuditFacts) -> str:
    """Such as `layer 3, moe, expert 4`, or the matrix that was looked at alone."""
    if row["matrix"] is not None:
        return f"layer {row['layer']}, {row['block']}: {row['matrix']}"
    return f"layer {row['layer']}, {row['block']}" + ("" if row["expert"] is None else f", expert {row['expert']}")


def is_shown(row: RowFacts) -> bool:
    """Whether a short table has it: what has a limit, or is looked at first."""
    return METRICS[row["metric"]].is_shown or row["limit"] is not None or row["value"] is None
