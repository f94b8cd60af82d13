"""report.json: schema 1 of the contract."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compress.check.compare import Verdict
from compress.checkpoint import config_dtype
from compress.checkpoint.companions import left_behind
from compress.model import sizes
from compress.output_folder.manifest import versions
from compress.passes import Coverage
from compress.report.schema import ArtifactFacts, CalibrationFacts, CoverageFacts, ModelFacts, Report, SizeFacts
from compress.runtime import runtimes

if TYPE_CHECKING:
    from compress.apply.pipeline import Outcome
    from compress.apply.plan import Plan
    from compress.plugins import Exported
    from compress.recipe.source import Source

# of a checkpoint: what it needs to run but the tokenizer
CHECKPOINT_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json")


def report(source: Source, planned: Plan, outcome: Outcome, folder: Path, verdict: Verdict) -> Report:
    """Assembles the report from the plan, what was done and the files as written."""
    artifacts, checked = _artifacts(planned, outcome, folder), outcome.checked
    before, after = planned.model.architecture, planned.result.architecture
    found: Report = {
        "schema": 1,
        "verdict": verdict,
        "model": _model(source, planned, outcome),
        "size": _size(planned, min(artifacts, key=lambda artifact: artifact["weight_bytes"])),
        "passes": [step.to_json() for step in outcome.passes],
        "artifacts": artifacts,
        "runtimes": [runtime.to_json() for runtime in runtimes.of(planned.result, planned.recipe.export)],
        "states": sizes.states_as_kept(after),
        "state_memory": {
            "baseline": sizes.state_bytes(before).memory(),
            "candidate": sizes.state_bytes(after).memory(),
        },
        "prompts": outcome.prompts,
        **checked.facts(),  # type: ignore[typeddict-item]  # which holds no `calibration`, as it need not
        "versions": versions(),
    }
    if outcome.calibration:
        found["calibration"] = _calibration(outcome)
    return found


def _artifacts(planned: Plan, outcome: Outcome, folder: Path) -> list[ArtifactFacts]:
    """The checkpoint, with what whoever uses it must know, then the exports."""
    model, result = planned.model, planned.result
    checkpoint = _checkpoint_artifact(planned, folder / "checkpoint")
    notes = [fact.text for fact in planned.changes] + config_dtype.changes(model, result) + sizes.travelling(result)
    if notes := notes + left_behind(planned.source.folder):
        checkpoint["notes"] = notes
    exports = (_exported_artifact(made, folder / made.kind, model.parameters) for made in outcome.exported)
    return [checkpoint, *exports]


def _model(source: Source, planned: Plan, outcome: Outcome) -> ModelFacts:
    model = planned.model
    return {
        "name": source.name,
        "revision": source.revision,
        "weights_sha256": outcome.weights_sha256,
        "model_type": model.model_type,
        "parameters": model.parameters,
        "active_parameters": sizes.active_parameters(model.architecture, model.units),
    }


def _size(planned: Plan, smallest: ArtifactFacts) -> SizeFacts:
    return {
        "baseline_bytes": planned.opened.files.bytes,
        "baseline_float32_bytes": 4 * planned.model.parameters,
        "candidate_bytes": smallest["weight_bytes"],
        "bits_per_weight": smallest["bits_per_weight"],
        "candidate_parameters": planned.result.parameters,
    }


def _calibration(outcome: Outcome) -> CalibrationFacts:
    """What was used, and how many tokens reached each expert."""
    found: CalibrationFacts = {
        "tokens": sum(entry["tokens"] for entry in outcome.calibration),
        "prompts": [entry["name"] for entry in outcome.calibration],
        "windows": sum(entry["windows"] for entry in outcome.calibration),
    }
    if warnings := [f"{entry['name']}: {entry['warning']}" for entry in outcome.calibration if "warning" in entry]:
        found["warnings"] = warnings
    covered = [coverage for step in outcome.passes if (coverage := step.step.coverage(step.details))]
    if covered:
        found["expert_coverage"] = _coverage(covered[-1])
    return found


def _coverage(coverage: Coverage) -> CoverageFacts:
    """Of the last pass that counted: an earlier one may have removed experts, and numbered the others anew."""
    found: CoverageFacts = {"min_tokens": coverage.min_tokens, "experts_below_threshold": list(coverage.below)}
    if coverage.below:
        found["below_threshold"] = coverage.sentence
    return found


def _checkpoint_artifact(planned: Plan, folder: Path) -> ArtifactFacts:
    shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    total = shards + sum((folder / name).stat().st_size for name in CHECKPOINT_FILES if (folder / name).is_file())
    return _artifact("checkpoint", "checkpoint", total, planned.checkpoint_bytes, planned.model.parameters)


def _exported_artifact(exported: Exported, folder: Path, parameters: int) -> ArtifactFacts:
    artifact = _artifact(
        exported.kind, f"{exported.kind}/{exported.main}", exported.bytes(folder), exported.weight_bytes, parameters
    )
    if exported.notes:
        artifact["notes"] = list(exported.notes)
    if exported.build is not None:
        artifact["build"] = exported.build
    return artifact


def _artifact(kind: str, path: str, total: int, weight_bytes: int, parameters: int) -> ArtifactFacts:
    return {
        "kind": kind,
        "path": path,
        "bytes": total,
        "graph_bytes": total - weight_bytes,
        "weight_bytes": weight_bytes,
        "bits_per_weight": 8 * weight_bytes / parameters,
    }
