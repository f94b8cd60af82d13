"""report.md: the same facts as report.json, for reading. What a pull request shows without a click is the verdict, what is wrong
by name, the size and one row for each artifact; all else is folded."""

from collections.abc import Sequence

from compress.check.changes import ChangeFacts
from compress.check.compare import FoundFacts, Verdict
from compress.prompts import Used
from compress.report import changes, findings, folded, measures, overview, written
from compress.report.passes import PassDone
from compress.report.schema import ArtifactFacts, CheckFacts, Report
from compress.report.words import notes
from compress.runtime.runtimes import Runtime, as_lines
from compress.terminal.escaping import code, markdown

NAMED = 8  # things that are wrong, and are named on the first screen


def render(report: Report, done: Sequence[PassDone]) -> str:
    """report.json as Markdown, with what the passes say of themselves."""
    details = [
        _artifacts(report),
        folded.of(written.engines(report)),
        *found_sections(report, report["prompts"]),
        folded.of(written.states(report)),
        _passes(report, done),
        versions(report["versions"]),
    ]
    head = [_headline(report["model"]["name"], report["verdict"], report), _size(report)]
    head += [_lines(report, report["artifacts"])]
    return "\n".join(part for part in [*head, *details] if part)


def render_check(result: CheckFacts) -> str:
    """What `check` found, of the same kind."""
    name = f"{result['candidate']} against {result['baseline']['name']}"
    worse, changed = changes.worse(result), changes.tables(result)
    head = [_headline(name, result["verdict"], result, worse), _lines(result, ())]
    head += [f"{markdown(table.title)}:\n\n{folded.shown(table)}\n" for table in changed]
    details = [*found_sections(result, result["prompts"]), versions(result["versions"])]
    return "\n".join(part for part in [*head, *details] if part)


def _headline(name: str, verdict: Verdict, found: FoundFacts, worse: Sequence[ChangeFacts] = ()) -> str:
    """The verdict, why, and what to know before believing it."""
    failed, why = overview.failures(found, worse), "; ".join(overview.reasons(found, worse))
    said = [f"- **{f.kind}** {markdown(f.artifact)}: {code(f.subject)}: {markdown(f.words)}" for f in failed[:NAMED]]
    said += [f"- and {len(failed) - NAMED} more, below"] if len(failed) > NAMED else []
    said += [f"- Note: {markdown(remark)}" for remark in found["remarks"]]
    title = f"# {markdown(name)}: {overview.verdict(verdict, found, worse)}\n"
    return "\n".join([title, *([f"**{why}.**\n"] if why else []), *said, *([""] if said else [])])


def _size(report: Report) -> str:
    model, size = report["model"], report["size"]
    ratio = size["candidate_bytes"] / size["baseline_float32_bytes"]
    return (
        f"Weights: {size['baseline_bytes']:,} bytes before, {size['candidate_bytes']:,} after "
        f"({size['bits_per_weight']:.2f} bits per weight of the original, {ratio:.3f} of float32). "
        f"{model['parameters']:,} parameters ({model['active_parameters']:,} active), model type {code(model['model_type'])}.\n"
    )


def _lines(found: FoundFacts, artifacts: Sequence[ArtifactFacts]) -> str:
    table = overview.table(found, artifacts)
    return folded.shown(table) + "\n" if table.rows else ""


def _artifacts(report: Report) -> str:
    notes = [f"{markdown(a['kind'])}: {markdown(note)}\n" for a in report["artifacts"] for note in a.get("notes", [])]
    loads = [f"- Loads in: {markdown(line)}" for line in as_lines([Runtime(**row) for row in report["runtimes"]])]
    return folded.of(written.artifacts(report), "\n".join([*notes, *loads]))


def found_sections(found: FoundFacts, used: Sequence[Used]) -> list[str]:
    """All that was measured, folded."""
    said = "".join([_prompts(used), *(f"- {markdown(note)}\n" for note in notes(found["checks"]))])
    return [
        folded.of(findings.audit(found["audit"])),
        folded.of(findings.layer_audit(found["layer_audit"])),
        folded.of(measures.checks(found["checks"]), said),
        folded.of(findings.flips(found["flips"])),
        folded.of(findings.worst_prompts(found["worst_prompts"])),
        folded.of(findings.tasks(found["tasks"])),
        folded.of(measures.by_position(found["by_position"])),
        folded.of(measures.recall(found["recall"])),
        folded.of(measures.states(found["state_health"], found["state_saturation"])),
        folded.of(measures.generated(found["generated"])),
    ]


def _prompts(used: Sequence[Used]) -> str:
    lines = [f"- {code(p['name'])}: {p['windows']} windows, {p['tokens']:,} tokens\n" for p in used]
    return "".join(
        lines + [f"- Warning: {code(p['name'])}: {markdown(p['warning'])}\n" for p in used if "warning" in p]
    )


def _passes(report: Report, done: Sequence[PassDone]) -> str:
    if not done:
        return ""
    seconds, names = sum(step.seconds for step in done), ", ".join(step.name for step in done)
    return folded.section(f"Passes: {names}, {seconds:.1f} s", "\n".join(pass_lines(report, done)))


def pass_lines(report: Report, done: Sequence[PassDone]) -> list[str]:
    """What passes say of themselves, and what they were calibrated on."""
    return [*(line for step in done for line in step.lines()), *_calibration(report)]


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
