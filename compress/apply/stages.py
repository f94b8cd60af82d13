"""The stages of `apply`, by the names that their progress is shown under, in the order they come."""

from compress import prompts
from compress.apply.plan import Plan
from compress.calibration import ranges
from compress.check import audit, baseline, compare, generated, layer_audit, state_costs, states, tasks
from compress.disk.paths import as_text
from compress.model.config import Config
from compress.recipe.check import PHASES, Check

SURVEY, COMPRESSING = "survey", "compressing"
SETTLING = (state_costs.TOGETHER, state_costs.ALONE, state_costs.TOGETHER)  # as begun, state by state, as chosen


def exporting(kind: str) -> str:
    return f"exporting {kind}"


def of(planned: Plan) -> list[str]:
    """All that a plan may need. Those that were done before, and those whose result is kept in the cache, are skipped."""
    calibrated = planned.calibration.prompts if planned.needs_windows else ()
    surveys = [SURVEY for step in planned.passes if step.needs_survey]
    exports = [step.name for step in planned.recipe.export]
    settling = [name for step in planned.passes if step.needs_settling for name in SETTLING]
    measuring = [ranges.STAGE] if planned.needs_ranges else []
    names = [*map(prompts.stage, calibrated), *surveys, COMPRESSING, *settling, *measuring, *map(exporting, exports)]
    if planned.recipe.check is None:
        return names
    return names + _of_check(planned.recipe.check, planned.result.config, ["checkpoint", *exports])


def _of_check(check: Check, config: Config, artifacts: list[str]) -> list[str]:
    audits = [stage(name) for name in artifacts for stage in (audit.stage, layer_audit.stage)] if check.audit else []
    found = [*audits, *map(prompts.stage, check.prompts), *map(baseline.stage, check.prompts)]
    writers = [generated.stage(name) for name in (generated.BASELINE, *artifacts)] if check.generate else []
    found += writers[:1]
    found += [tasks.stage(tasks.BASELINE, as_text(name)) for name in check.tasks]
    found += [states.STAGE] if states.are_watched(check.states, config) else []
    for place, artifact in enumerate(artifacts, start=1):
        found += [compare.stage(artifact, phase, name) for phase in PHASES for name in check.prompts]
        found += [tasks.stage(artifact, as_text(name)) for name in check.tasks]
        found += writers[place : place + 1]
    return found
