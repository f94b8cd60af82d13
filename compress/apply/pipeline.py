"""`apply`: recipe -> checkpoint -> exports -> check -> report, on one screen, in the order the data flows."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

import compress
from compress import prompts
from compress.apply import exporting, plan, ranging, reporting, settling, stages, surveys, sweep
from compress.apply.plan import Plan
from compress.check import engines, judge
from compress.check.compare import Found, verdict
from compress.checkpoint import companions, compressed_tensors, config_dtype, writer
from compress.checkpoint.reader import Checkpoint
from compress.disk import cache, files, json_files
from compress.errors import InputError
from compress.model import records
from compress.model.records import Record
from compress.output_folder import manifest
from compress.output_folder.integrity import MANIFEST
from compress.output_folder.workspace import Workspace
from compress.passes import PassContext
from compress.plugins import Exported
from compress.prompts import Used
from compress.recipe.recipe import ExportStep, LoadedRecipe, Recipe
from compress.recipe.source import Source
from compress.report import junit, markdown, model_card
from compress.report.html import report_page, strip
from compress.report.passes import PassDone
from compress.report.schema import Report
from compress.runtime.artifacts import CheckpointArtifact
from compress.strict.json_text import JsonObject
from compress.terminal import progress


@dataclass(frozen=True)
class Job:
    """One `apply`: what to do, to what, where."""

    recipe: LoadedRecipe
    source: Source
    out: Path
    device: str = "cpu"
    seed: int = 0
    resume: bool = False
    overwrite: bool = False


@dataclass
class Outcome:
    """What was done, as the report tells it."""

    weights_sha256: str
    passes: list[PassDone] = field(default_factory=list)
    calibration: list[Used] = field(default_factory=list)
    exported: list[Exported] = field(default_factory=list)
    checked: Found = field(default_factory=Found)
    prompts: list[Used] = field(default_factory=list)


def prepare(job: Job, *, needs_weights: bool = True) -> Plan:
    """Refuses what can be refused before a weight is read. A folder with only config.json will do for a plan."""
    context = PassContext(job.device, job.seed)
    return plan.make(job.recipe.recipe, job.source, context, job.recipe.folder, needs_weights=needs_weights)


def apply(job: Job) -> Report:
    """Runs the job and publishes `job.out`; returns the report."""
    with Workspace(job.out, resume=job.resume, overwrite=job.overwrite) as space:
        planned = prepare(job)
        _refuse_shortages(job, planned)
        with progress.stages(stages.of(planned)):
            return _run(job, planned, space)


def _refuse_shortages(job: Job, planned: Plan) -> None:
    """Disk, memory, and a cache that cannot be used: before the work, not after it."""
    if planned.recipe.check is not None:
        cache.folder("baseline")
    if found := plan.shortages(planned, job.out):
        raise InputError(found[0])


def _run(job: Job, planned: Plan, space: Workspace) -> Report:
    outcome = Outcome(planned.opened.weights_sha256())
    windows = _calibration_windows(job, planned, outcome) if planned.needs_windows else None
    space.begin(_key(job, planned, outcome, windows))
    try:
        planned = surveys.run(planned, PassContext(job.device, job.seed), space, windows)
        planned = _write_checkpoint(job, planned, outcome, space, windows)
    except InputError:
        space.discard()  # bad weights are not worth resuming: a corrected model is a different job
        raise
    written = Checkpoint(space.folder / "checkpoint", allow_quantized=True)
    outcome.exported = [_export(step, written, space, windows or [], job.device) for step in planned.recipe.export]
    _check(job, planned, outcome, space.folder)
    for exported in outcome.exported:
        if exported.build is not None:
            engines.add(outcome.checked, exported.kind, exported.build)
    return _publish(job, planned, outcome, space)


def _key(job: Job, planned: Plan, outcome: Outcome, windows: list[torch.Tensor] | None) -> JsonObject:
    """What must not change between an interruption and `--resume`."""
    key: JsonObject = {
        "recipe": job.recipe.resolved_yaml(),
        "model": planned.opened.sha256(outcome.weights_sha256),
        "seed": job.seed,
        "version": compress.__version__,
    }
    return key if windows is None else key | {"calibration": prompts.digest(windows)}


def _write_checkpoint(
    job: Job, planned: Plan, outcome: Outcome, space: Workspace, windows: list[torch.Tensor] | None
) -> Plan:
    """Runs the passes and writes shard after shard, then what makes a checkpoint of them; returns the plan as passes
    decided it in the end."""
    context = PassContext(job.device, job.seed)
    swept = sweep.run(planned, context, space, windows if planned.needs_calibration else None)
    if swept.written:
        space.forget([ranging.JOURNAL, *(step.name for step in planned.recipe.export)])
    folder = space.folder / "checkpoint"
    writer.write_index(folder, planned.units)

    def write_config(planned: Plan) -> None:
        _write_companions(planned, folder, sweep.records(planned, swept))

    planned = settling.run(planned, context, space, windows or [], swept, write_config)
    write_config(planned)
    outcome.passes = sweep.done(planned, swept)
    return planned


def _calibration_windows(job: Job, planned: Plan, outcome: Outcome) -> list[torch.Tensor]:
    """What passes and exporters look at; the outcome hears of the prompts."""
    original = CheckpointArtifact(planned.opened, job.device, outcome.weights_sha256)
    sets = prompts.load_all(
        original, original.sha256(), planned.calibration, purpose="calibration",
        seed=job.seed, folder=job.recipe.folder,
    )  # fmt: skip
    outcome.calibration = prompts.used(sets)
    windows = prompts.longest_first(sets)
    plan.refuse_short_windows(planned, len(windows[0]), "the longest that the prompts give has")
    return windows


def _write_companions(planned: Plan, folder: Path, done: list[Record]) -> None:
    """config.json with its quantization section and what passes did, the tokenizer and papers of the source."""
    restated = config_dtype.restated(planned.result.config_json, planned.model, planned.result)
    config = records.added(companions.without_code(restated), done)
    section = compressed_tensors.quantization_config(
        weight for unit in planned.units for weight in unit.weights.values()
    )
    if section:
        config["quantization_config"] = section
    writer.write_config(folder, config)
    writer.copy_companions(planned.source.folder, folder)


def _export(
    step: ExportStep, written: Checkpoint, space: Workspace, windows: list[torch.Tensor], device: str
) -> Exported:
    """One export into its folder; one that an earlier run finished is only described again."""
    exporter, folder = step.bound(), space.folder / step.name
    if not space.is_done(step.name):
        if exporter.needs_ranges:
            exporter = exporter.fitted(written, ranging.in_workspace(written, windows, space, device))
        exporting.remove_unfinished(folder)
        exporting.export_to(exporter, step.name, written, folder)
        space.mark_done(step.name)
    else:
        progress.tell(f"reused from the earlier run: the export {step.name}")
    return exporter.describe(folder)


def _check(job: Job, planned: Plan, outcome: Outcome, folder: Path) -> None:
    """Compares every artifact as written with the original."""
    if planned.recipe.check is None:
        return
    artifacts = {"checkpoint": folder / "checkpoint"}
    artifacts |= {exported.kind: folder / exported.kind / exported.main for exported in outcome.exported}
    original = CheckpointArtifact(planned.opened, job.device, outcome.weights_sha256)
    outcome.checked, outcome.prompts = judge.check(
        original, artifacts, planned.recipe.check, seed=job.seed, device=job.device, prompt_folder=job.recipe.folder
    )


def _publish(job: Job, planned: Plan, outcome: Outcome, space: Workspace) -> Report:
    """Report, recipe, and last of all the manifest; then the folder gets its name."""
    resolved = planned.recipe.resolved_yaml()
    report = reporting.report(job.source, planned, outcome, space.folder, verdict(outcome.checked))
    json_files.write_json(space.folder / "report.json", report)
    files.write_text(space.folder / "report.md", markdown.render(report, outcome.passes))
    page = report_page.render(report, outcome.passes, strip.strip(planned.result.architecture, planned.units), resolved)
    files.write_text(space.folder / "report.html", page)
    files.write_text(space.folder / "junit.xml", _as_tests(report, planned.recipe))
    files.write_text(space.folder / "recipe.yaml", job.recipe.text)
    files.write_text(space.folder / "recipe.resolved.yaml", resolved)
    formats = {"checkpoint": {w.name: w.format for unit in planned.units for w in unit.weights.values()}}
    formats |= {exported.kind: exported.formats for exported in outcome.exported}
    card = model_card.render(report, formats["checkpoint"], job.source.folder, resolved)
    files.write_text(space.folder / "checkpoint" / companions.CARD, card)
    files.sync_tree(space.folder)
    json_files.write_json(space.folder / MANIFEST, manifest.build(space.folder, job.seed, formats))
    space.publish()
    return report


def _as_tests(report: Report, recipe: Recipe) -> str:
    """What a CI system lists."""
    artifacts = [artifact["kind"] for artifact in report["artifacts"]]
    on_undecided = "fail" if recipe.check is None else recipe.check.on_undecided
    return junit.render(report["model"]["name"], report, artifacts, on_undecided)
