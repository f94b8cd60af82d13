"""report.md: the same facts as report.json, for reading. What a pull request shows without a click is the verdict, what is wrong
by name, the size and one row for each artifact; all else is folded."""

from collections.abc import Sequence

from compress.check.compare import FoundFacts, RowFacts
from compress.model.sizes import StateFacts
from compress.prompts import Used
from compress.recipe.check import MetricName
from compress.report import findings, folded, measures, overview
from compress.report.passes import PassDone
from compress.report.schema import ArtifactFacts, CheckFacts, Report
from compress.report.terminal import interval_words, notes, value_words, verdict_words
from compress.runtime.runtimes import Runtime, as_lines
from compress.terminal.escaping import code, code_cell, markdown

NAMED = 8  # things that are wrong, and are named on the first screen
TITLES = {"perplexity_ratio": "perplexity ratio", "kl_divergence_mean": "KL, nats", "top1_agreement": "same top-1"}
MARKS = {None: "", "held": "held", "missed": "**missed**", "undecided": "**undecided**"}


def render(report: Report, done: Sequence[PassDone]) -> str:
    """report.json as Markdown, with what the passes say of themselves."""
    details = [
        _artifacts(report),
        *found_sections(report, report["prompts"]),
        _states(report),
        _passes(report, done),
        versions(report["versions"]),
    ]
    head = [_headline(report["model"]["name"], report["verdict"], report), _size(report)]
    head += [_lines(report, report["artifacts"])]
    return "\n".join(part for part in [*head, *details] if part)


def render_check(result: CheckFacts) -> str:
    """What `check` found, of the same kind."""
    name = f"{result['candidate']} against {result['baseline']['name']}"
    head = [_headline(name, result["verdict"], result), _lines(result, ())]
    details = [*found_sections(result, result["prompts"]), versions(result["versions"])]
    return "\n".join(part for part in [*head, *details] if part)


def _headline(name: str, verdict: str, found: FoundFacts) -> str:
    """The verdict, why, and what to know before believing it."""
    failed, why = overview.failures(found), "; ".join(overview.reasons(found))
    said = [f"- **{f.kind}** {markdown(f.artifact)}: {code(f.subject)}: {markdown(f.words)}" for f in failed[:NAMED]]
    said += [f"- and {len(failed) - NAMED} more, below"] if len(failed) > NAMED else []
    said += [f"- Note: {markdown(remark)}" for remark in found["remarks"]]
    title = f"# {markdown(name)}: {verdict_words(verdict, found['checks'])}\n"
    return "\n".join([title, *([f"**{why}.**\n"] if why else []), *said, *([""] if said else [])])


def _size(report: Report) -> str:
    model, size = report["model"], report["size"]
    ratio = size["candidate_bytes"] / size["baseline_float32_bytes"]
    return (
        f"Weights: {size['baseline_bytes']:,} bytes before, {size['candidate_bytes']:,} after "
        f"({size['bits_per_weight']:.2f} bits per weight of the original, {ratio:.3f} of float32). "
        f"{model['parameters']:,} parameters ({model['active_parameters']:,} active), model type {code(model['model_type'])}.\n"
    )


def _lines(found: FoundFacts, written: Sequence[ArtifactFacts]) -> str:
    """A row for each artifact."""
    sizes = ["bytes", "bits per weight"] if written else []
    metrics = overview.FIGURES if found["checks"] else ()
    rows = [_line(line, len(sizes), metrics) for line in overview.lines(found, written)]
    head = ["artifact", *sizes, *(TITLES[metric] for metric in metrics), "verdict"]
    return folded.table(head, rows) + "\n" if rows else ""


def _line(line: overview.Line, sizes: int, metrics: Sequence[MetricName]) -> list[str]:
    size = ["", ""] if line.size is None else [f"{line.size['bytes']:,}", f"{line.size['bits_per_weight']:.2f}"]
    figures = [_figure(line.figures[metric]) if metric in line.figures else "" for metric in metrics]
    is_good = line.outcome in ("pass", "not checked")
    return [markdown(line.artifact), *size[:sizes], *figures, line.outcome if is_good else f"**{line.outcome}**"]


def _figure(row: RowFacts) -> str:
    """The perplexity ratio with its interval; the fold has that of the others."""
    interval = interval_words(row["low"], row["high"]) if row["metric"] == "perplexity_ratio" else ""
    return value_words(row) + (f" ({interval})" if interval else "")


def _artifacts(report: Report) -> str:
    rows = [
        [
            markdown(a["kind"]),
            code_cell(a["path"]),
            f"{a['bytes']:,}",
            f"{a['graph_bytes']:,}",
            f"{a['bits_per_weight']:.2f}",
        ]
        for a in report["artifacts"]
    ]
    head = ("kind", "path", "bytes", "of which not weights", "bits per weight")
    notes = [f"{markdown(a['kind'])}: {markdown(note)}\n" for a in report["artifacts"] for note in a.get("notes", [])]
    loads = [f"- Loads in: {markdown(line)}" for line in as_lines([Runtime(**row) for row in report["runtimes"]])]
    return folded.section("Artifacts, and what loads them", "\n".join([folded.table(head, rows), "", *notes, *loads]))


def _states(report: Report) -> str:
    """What a sequence takes, where states are kept in formats of their own."""
    if not report["states"]:
        return ""
    before, after = report["state_memory"]["baseline"], report["state_memory"]["candidate"]
    contexts = [int(tokens) for tokens in after["total"]["at"]]
    head = ["", "kept as", *(f"bytes at {tokens // 1024}K tokens" for tokens in contexts)]
    rows = [
        [
            markdown(kind),
            markdown(_formats(report, kind)),
            *(f"{before[kind]['at'][at]:,} -> {after[kind]['at'][at]:,}" for at in after[kind]["at"]),
        ]
        for kind in after
    ]
    return folded.section("States of a sequence", folded.table(head, rows))


def _formats(report: Report, kind: str) -> str:
    """Those in which layers keep a kind of state."""
    rows = [row for row in report["states"] if row["kind"] == kind]
    return ", ".join(dict.fromkeys(map(_format, rows)))


def _format(row: StateFacts) -> str:
    """Such as `int8 + int8 every 4 tokens`, the second being what rounding loses."""
    words = [row["format"], "stochastic" if row["rounding"] == "stochastic" else ""]
    words += [
        f"+ {row['residual']}" if "residual" in row else "",
        f"every {row['every']} tokens" if row["every"] > 1 else "",
    ]
    return " ".join(filter(None, words))


def found_sections(found: FoundFacts, used: Sequence[Used]) -> list[str]:
    """All that was measured, folded."""
    return [
        findings.audit(found["audit"]),
        findings.layer_audit(found["layer_audit"]),
        _checks(found, used),
        findings.flips(found["flips"]),
        findings.worst_prompts(found["worst_prompts"]),
        findings.tasks(found["tasks"]),
        measures.by_position(found["by_position"]),
        measures.recall(found["recall"]),
        measures.states(found["state_health"], found["state_saturation"]),
        measures.generated(found["generated"]),
    ]


def _checks(found: FoundFacts, used: Sequence[Used]) -> str:
    rows = found["checks"]
    if not rows:
        return ""
    outcomes = [outcome for row in rows if (outcome := overview.outcome(row))]
    counts = ", ".join(f"{outcomes.count(word)} {word}" for word in dict.fromkeys(outcomes)) or "no limits were set"
    head = ("artifact", "phase", "prompts", "metric", "value", "95 % interval", "limit", "")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *map(_check_row, rows)]
    said = [f"- {markdown(note)}\n" for note in notes(rows)]
    return folded.section(f"All {len(rows)} figures: {counts}", "\n".join([*lines, "", _prompts(used), *said]))


def _check_row(row: RowFacts) -> str:
    limit = "" if row["limit"] is None else f"{row['limit']:g}"
    mark = MARKS[overview.outcome(row)]
    interval = interval_words(row.get("low"), row.get("high"))
    name = f"{markdown(row['artifact'])} | {row['phase']} | {markdown(row['prompts'])} | {row['metric']}"
    return f"| {name} | {value_words(row)} | {interval} | {limit} | {mark} |"


def _prompts(used: Sequence[Used]) -> str:
    lines = [f"- {code(p['name'])}: {p['windows']} windows, {p['tokens']:,} tokens\n" for p in used]
    return "".join(
        lines + [f"- Warning: {code(p['name'])}: {markdown(p['warning'])}\n" for p in used if "warning" in p]
    )


def _passes(report: Report, done: Sequence[PassDone]) -> str:
    if not done:
        return ""
    lines = [line for step in done for line in step.lines()]
    seconds = sum(step.seconds for step in done)
    names = ", ".join(step.name for step in done)
    return folded.section(f"Passes: {names}, {seconds:.1f} s", "\n".join([*lines, *_calibration(report)]))


def _calibration(report: Report) -> list[str]:
    if "calibration" not in report:
        return []
    used = report["calibration"]
    lines = [
        f"- Calibrated on {used['tokens']:,} tokens of {', '.join(map(markdown, used['prompts']))} ({used['windows']} windows)."
    ]
    lines += [f"- Warning: {markdown(warning)}" for warning in used.get("warnings", [])]
    if coverage := used.get("expert_coverage"):
        lines.append(f"- Of the experts, the least used one saw {coverage['min_tokens']:,} tokens.")
        if cold := coverage["experts_below_threshold"]:
            lines.append(f"- {len(cold)} experts {markdown(coverage['below_threshold'])}: {markdown(', '.join(cold))}.")
    return lines


def versions(found: dict[str, str]) -> str:
    return folded.section("Versions", ", ".join(f"{name} {value}" for name, value in found.items()))
