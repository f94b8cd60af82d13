"""`compress check`: settings from flags, one comparison, rows to the terminal."""

from dataclasses import dataclass
from pathlib import Path

from compress import prompts
from compress.check import engines, genai, judge, tokenizers
from compress.disk.paths import as_text
from compress.errors import InputError
from compress.output_folder import build_facts, integrity, onnx_layouts
from compress.output_folder.manifest import versions
from compress.prompts import task_files
from compress.recipe.check import DEFAULT, Check
from compress.report import changes, terminal
from compress.report.schema import CheckFacts
from compress.report.words import verdict_words
from compress.runtime.artifacts import Artifact, find_artifact, open_artifact
from compress.strict import yaml_text
from compress.strict.json_text import JsonObject
from compress.strict.models import from_flags, no_truth_value
from compress.studies.across import Across
from compress.studies.check_options import Flags
from compress.studies.originals import Originals
from compress.terminal import output


@dataclass(frozen=True)
class Job:
    """One check, as the command line asks for it."""

    baseline: str
    candidate: Path
    checks: Check
    originals: Originals
    beside: Across
    seed: int
    device: str


def settings(flags: Flags) -> Check:
    """Flags to validated settings; a --limit overrides the same metric of --limits, a file or `default`."""
    named = from_flags(Check, limits=dict(_limit(text) for text in flags["limits"])).limits
    checks = from_flags(
        Check,
        prompts=flags["prompts"] or ("heldout",),
        samples=flags["samples"],
        length=flags["length"],
        prefill=flags["prefill"],
        recall=_recall(flags),
        audit=flags["audit"],
        states=flags["states"],
        generate=_generate(flags["generate"], flags["tokens"]),
        tasks=flags["tasks"],
        limits=DEFAULT if flags["limits_from"] == DEFAULT else _file_limits(flags["limits_from"]),
        on_undecided=flags["on_undecided"],
    )
    return checks.with_limits(named)


def _recall(flags: Flags) -> dict[str, object] | None:
    distances, trials = flags["distances"], flags["trials"]
    if not distances and trials is None:
        return None
    if "recall" not in flags["prompts"]:
        raise InputError("--distance and --trials are about the prompt set 'recall', which is not in 'prompts'")
    return {"distances": distances} | ({} if trials is None else {"trials": trials})


def _generate(prompts: int | None, tokens: int | None) -> dict[str, int] | None:
    if prompts is None and tokens is not None:
        raise InputError("--tokens says how long the texts of --generate are, which is not there")
    given = {"prompts": prompts, "tokens": tokens}
    return None if prompts is None else {key: value for key, value in given.items() if value is not None}


def _limit(text: str) -> tuple[str, float]:
    """Numbers mean what they mean in a file of limits."""
    metric, _, value = text.partition("=")
    try:
        number = no_truth_value(yaml_text.parse_scalar(value, f"--limit {metric}"))
        if isinstance(number, int | float | str):
            return metric, float(number)
        raise TypeError(number)
    except (TypeError, ValueError):
        raise InputError(f"--limit {text}: expected METRIC=VALUE, such as kl_divergence_mean=0.01") from None


def _file_limits(name: str | None) -> JsonObject:
    if name is None:
        return {}
    path = Path(name)
    values = yaml_text.load(path).data
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of METRIC: VALUE")
    try:
        from_flags(Check, limits=values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return values


def compare(job: Job) -> CheckFacts:
    """Compares the two and shows the rows on stderr; returns what `--json` writes."""
    path, checks = find_artifact(job.candidate), job.checks
    integrity.verify(path)
    original = job.originals.open(job.baseline, checks, job.seed, job.device)
    for name in checks.prompts:
        prompts.refuse_unusable(name, original.folder, length=checks.length, asking=checks.recall)
    task_files.load_all(checks.tasks, original.folder, original.config)
    job.originals.verify(job.baseline, original)  # last: it reads everything
    integrity.verify(path, digests=True)
    _refuse_unfit(original, path, checks)
    return _measured(job, original, path)


def _measured(job: Job, original: Artifact, path: Path) -> CheckFacts:
    artifact, begun = open_artifact(path), job.beside.begin(original, job.checks, job.seed)
    checks, left_out = job.originals.narrowed(original, artifact, job.checks)
    with job.originals.measuring() as noted:
        found, used = judge.check(
            original, {_kind(path): path}, checks, seed=job.seed, device=job.device, is_old=begun.is_old
        )
        found.remarks += left_out
        if (built := build_facts.beside(path)) is not None:
            engines.add(found, _kind(path), built)
        changed, now = job.beside.compare(begun, as_text(str(job.candidate)), found, artifact.weight_bytes)
        result: CheckFacts = {
            "schema": 1,
            "verdict": job.beside.verdict(found, changed),
            "baseline": {"name": as_text(job.baseline), "sha256": original.sha256()},
            "candidate": now.candidate,
            "prompts": used,
            **found.facts(),
            **changed,
            "versions": versions(),
        }
        _show(result, job.beside.because(changed))
        job.originals.save(job.baseline, original, checks, job.seed, noted)
    job.beside.save(now)
    return result


def _show(result: CheckFacts, because: str) -> None:
    console = output.console(stderr=True)
    terminal.show_found(result, console)
    if "change" in result:
        changes.show(f"{result['candidate']} after {result['baseline']['name']}", result["change"], console)
    if "against_result" in result:
        against = result["against_result"]
        changes.show(
            f"{result['candidate']} after {against['candidate']}, of {against['file']}", against["changes"], console
        )
    console.print(f"verdict: {verdict_words(result['verdict'], result)}{because}")


def _refuse_unfit(original: Artifact, path: Path, checks: Check) -> None:
    """What ships beside the weights decides what users get, too: the tokenizer, and how genai runs the graph."""
    tokenizers.refuse_other(
        original.folder, onnx_layouts.folder_of(path), text_needed=checks.prompts != ("self",) or bool(checks.tasks)
    )
    if path.suffix == ".onnx":
        genai.refuse_broken(path, open_artifact(path).config)


def _kind(path: Path) -> str:
    return as_text(onnx_layouts.folder_of(path).resolve().name) if path.suffix == ".onnx" else "checkpoint"
