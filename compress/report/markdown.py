"""report.md: the same facts as report.json, for reading."""

from compress.report.terminal import value_words, verdict_words
from compress.runtime.runtimes import Runtime, as_lines
from compress.terminal.escaping import code, markdown


def render(report: dict) -> str:
    """report.json as Markdown."""
    sections = [_headline(report), _artifacts(report), _checks(report), _passes(report), _versions(report)]
    return "\n".join(section for section in sections if section)


def _headline(report: dict) -> str:
    model, size = report["model"], report["size"]
    ratio = size["candidate_bytes"] / size["baseline_float32_bytes"]
    return (
        f"# {markdown(model['name'])}: {verdict_words(report)}\n\n"
        f"{model['parameters']:,} parameters ({model['active_parameters']:,} active), model type {code(model['model_type'])}.\n"
        f"Weights: {size['baseline_bytes']:,} bytes before, {size['candidate_bytes']:,} after "
        f"({size['bits_per_weight']:.2f} bits per weight of the original, {ratio:.3f} of float32).\n"
    )


def _artifacts(report: dict) -> str:
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


def _runtimes(report: dict) -> list[str]:
    """A line for each artifact, as in the dry run."""
    found = [Runtime(**row) for row in report["runtimes"]]
    return [f"- Loads in: {line}" for line in as_lines(found)]


def _checks(report: dict) -> str:
    if not report["checks"]:
        return "## Checks\n\nNone were asked for.\n"
    header = [
        "## Checks\n",
        "| artifact | phase | prompts | metric | value | limit | |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*header, *map(_check_row, report["checks"]), "", _prompts(report)])


def _check_row(row: dict) -> str:
    limit = "" if row["limit"] is None else f"{row['limit']:g}"
    mark = {None: "", True: "held", False: "**missed**"}[row["passed"]]
    return f"| {row['artifact']} | {row['phase']} | {markdown(row['prompts'])} | {row['metric']} | {value_words(row)} | {limit} | {mark} |"


def _prompts(report: dict) -> str:
    used = report.get("prompts", [])
    lines = [f"- {code(p['name'])}: {p['windows']} windows, {p['tokens']:,} tokens\n" for p in used]
    return "".join(lines + [f"- Warning: {code(p['name'])}: {p['warning']}\n" for p in used if "warning" in p])


def _passes(report: dict) -> str:
    if not report["passes"]:
        return ""
    lines = []
    for p in report["passes"]:
        peak = f"{p['peak_rss_bytes'] / 2**20:.0f} MiB"
        lines.append(f"- {p['name']}: {p['seconds']:.1f} s, peak {peak}. {_details(p['details'])}")
        lines += [f"  - {_layer(entry)}" for entry in p["details"].get("layers", [])]
    return "\n".join(["## Passes\n", *lines, *_calibration(report), ""])


def _calibration(report: dict) -> list[str]:
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


def _layer(entry: dict) -> str:
    """One layer that lost experts: which stay, what it lost on withheld calibration tokens, what every expert saw."""
    if len(entry["kept"]) == entry["experts"]:
        return f"layer {entry['layer']} keeps all {entry['experts']} experts."
    steps = {
        "pruned": "merged" if "groups" in entry else "without the others",
        "rescaled": "rescaled",
        "stored": "as stored",
    }
    losses = ", ".join(f"{entry['loss'][key]:.2g} {words}" for key, words in steps.items() if key in entry["loss"])
    text = f"layer {entry['layer']} keeps {_numbers(entry['kept'])} of {entry['experts']} experts; loss {losses}."
    if merged := [group for group in entry.get("groups", []) if len(group) > 1]:
        text += f" Merged into {'; '.join(f'{group[0]}: {_numbers(group[1:])}' for group in merged)}."
    if recovered := entry.get("recovered"):
        text += f" Corrected: {_numbers(recovered)}."
    if dead := entry["dead"]:
        text += f" No calibration token reached {_numbers(dead)}."
    tokens = ", ".join(f"{count:,}" for count in entry["tokens"])
    return f"{text} Tokens of expert 0 to {entry['experts'] - 1}, as they were numbered: {tokens}."


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _details(details: dict) -> str:
    text = f"Method {details['method']}." if "method" in details else ""
    if "experts_before" in details:
        text += (
            f" {details['experts_before']} experts before, {details['experts_after']} after; router: {details['router']}; "
            f"recovery: {details['recovery']}. Losses are means over withheld calibration tokens of the squared error, "
            "as a share of what the layer leaves of the token."
        )
    if stored := _counts(details.get("formats", {})):
        text += f" Stored as {stored}."
    if rounded := _counts(details.get("activations", {})):
        text += f" Inputs rounded to {rounded}."
    if rotated := details.get("rotated"):
        text += f" Stored rotated: {rotated} tensors."
    for note in details.get("notes", []):
        text += f" Note: {note}."
    for name in details.get("rounded_to_nearest", []):
        text += f" {markdown(name)} is rounded to nearest: it has no inputs to calibrate with."
    for entry in details.get("stored_otherwise", []):
        text += (
            f" {entry['tensors']} tensors of {entry['role']} are {entry['stored']}, not {entry['asked']}, "
            f"which does not divide their {entry['inputs']} inputs."
        )
    return text


def _counts(by_name: dict) -> str:
    return "; ".join(
        f"{name}: {entry['tensors']} tensors, {entry['parameters']:,} parameters"
        for name, entry in sorted(by_name.items())
    )


def _versions(report: dict) -> str:
    return "## Versions\n\n" + ", ".join(f"{name} {value}" for name, value in report["versions"].items()) + "\n"
