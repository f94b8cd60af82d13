"""The stages of `apply`, by the names that their progress is shown under, in the order they come."""

from compress import prompts
from compress.apply.plan import Plan
from compress.check import baseline, compare, state_costs
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
    names = [*map(prompts.stage, calibrated), *surveys, COMPRESSING, *settling, *map(exporting, exports)]
    return names + (_of_check(planned.recipe.check, ["checkpoint", *exports]) if planned.recipe.check else [])


def _of_check(check: Check, artifacts: list[str]) -> list[str]:
    scored = [
        compare.stage(artifact, phase, name) for artifact in artifacts for phase in PHASES for name in check.prompts
    ]
    return [*map(prompts.stage, check.prompts), *map(baseline.stage, check.prompts), *scored]
