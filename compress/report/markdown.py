"""report.md: the same facts as report.json, for reading."""

from collections.abc import Sequence

from compress.check.compare import RowFacts
from compress.model.sizes import StateFacts
from compress.report import measures
from compress.report.passes import PassDone
from compress.report.schema import Report
from compress.report.terminal import interval_words, notes, outcome_words, value_words, verdict_words
from compress.runtime.runtimes import Runtime, as_lines
from compress.terminal.escaping import code, markdown


def render(report: Report, done: Sequence[PassDone]) -> str:
    """report.json as Markdown, with what the passes say of themselves."""
    sections = [
        _headline(report),
        _artifacts(report),
        _states(report),
        _checks(report),
        _passes(report, done),
        _versions(report),
    ]
    return "\n".join(section for section in sections if section)


def _headline(report: Report) -> str:
    model, size = report["model"], report["size"]
    ratio = size["candidate_bytes"] / size["baseline_float32_bytes"]
    return (
        f"# {markdown(model['name'])}: {verdict_words(report['verdict'], report)}\n\n"
        f"{model['parameters']:,} parameters ({model['active_parameters']:,} active), model type {code(model['model_type'])}.\n"
        f"Weights: {size['baseline_bytes']:,} bytes before, {size['candidate_bytes']:,} after "
        f"({size['bits_per_weight']:.2f} bits per weight of the original, {ratio:.3f} of float32).\n"
    )


def _artifacts(report: Report) -> str:
    rows = [
        f"| {a['kind']} | {code(a['path'])} | {a['bytes']:,} | {a['graph_bytes']:,} | {a['bits_per_weight']:.2f} |"
        for a in report["artifacts"]
    ]
    notes = [f"\n{a['kind']}: {markdown(note)}" for a in report["artifacts"] for note in a.get("notes", [])]
    header = [
        "## Artifacts\n",
        "| kind | path | bytes | of which not weights | bits per weight |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*header, *rows, *notes, "", *_runtimes(report), ""])


def _runtimes(report: Report) -> list[str]:
    """A line for each artifact, as in the dry run."""
    found = [Runtime(**row) for row in report["runtimes"]]
    return [f"- Loads in: {line}" for line in as_lines(found)]


def _states(report: Report) -> str:
    """What a sequence takes, where states are kept in formats of their own."""
    if not report["states"]:
        return ""
    before, after = report["state_memory"]["baseline"], report["state_memory"]["candidate"]
    contexts = [int(tokens) for tokens in after["total"]["at"]]
    titles = ["kept as", *(f"bytes at {tokens // 1024}K tokens" for tokens in contexts)]
    rows = [
        f"| {kind} | {_formats(report, kind)} | "
        + " | ".join(f"{before[kind]['at'][at]:,} -> {after[kind]['at'][at]:,}" for at in after[kind]["at"])
        + " |"
        for kind in after
    ]
    header = ["## States of a sequence\n", f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    return "\n".join([*header, *rows, ""])


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


def _checks(report: Report) -> str:
    if not report["checks"]:
        return "## Checks\n\nNone were asked for.\n"
    header = [
        "## Checks\n",
        "| artifact | phase | prompts | metric | value | 95 % interval | limit | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    said = [f"- {note}\n" for note in notes(report["checks"])]
    details = [measures.by_position(report["by_position"]), measures.recall(report["recall"])]
    details += [measures.states(report["state_health"], report["state_saturation"])]
    details += [measures.generated(report["generated"])]
    return "\n".join([*header, *map(_check_row, report["checks"]), "", _prompts(report), *said, *details])


def _check_row(row: RowFacts) -> str:
    limit = "" if row["limit"] is None else f"{row['limit']:g}"
    mark = "**missed**" if row["outcome"] == "missed" else outcome_words(row)
    interval = interval_words(row.get("low"), row.get("high"))
    name = f"{row['artifact']} | {row['phase']} | {markdown(row['prompts'])} | {row['metric']}"
    return f"| {name} | {value_words(row)} | {interval} | {limit} | {mark} |"


def _prompts(report: Report) -> str:
    used = report["prompts"]
    lines = [f"- {code(p['name'])}: {p['windows']} windows, {p['tokens']:,} tokens\n" for p in used]
    return "".join(lines + [f"- Warning: {code(p['name'])}: {p['warning']}\n" for p in used if "warning" in p])


def _passes(report: Report, done: Sequence[PassDone]) -> str:
    if not done:
        return ""
    lines = [line for step in done for line in step.lines()]
    return "\n".join(["## Passes\n", *lines, *_calibration(report), ""])


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
            lines.append(f"- {len(cold)} experts {coverage['below_threshold']}: {', '.join(cold)}.")
    return lines


def _versions(report: Report) -> str:
    return "## Versions\n\n" + ", ".join(f"{name} {value}" for name, value in report["versions"].items()) + "\n"
