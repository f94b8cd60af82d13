"""The stages of `apply`, by the names that their progress is shown under, in the order they come."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.disk.paths import as_text
from compress.recipe.check import PHASES, Check

if TYPE_CHECKING:
    from compress.apply.plan import Plan

SURVEY, COMPRESSING = "survey", "compressing"


def prompts(name: str) -> str:
    return f"prompts: {as_text(name)}"


def exporting(kind: str) -> str:
    return f"exporting {kind}"


def baseline(prompt_set: str) -> str:
    return f"baseline on {as_text(prompt_set)}"


def scoring(artifact: str, phase: str, prompt_set: str) -> str:
    return f"{artifact}: {phase} on {as_text(prompt_set)}"


def of(planned: Plan) -> list[str]:
    """All that a plan may need. Those that were done before, and those whose result is kept in the cache, are skipped."""
    calibrated = planned.calibration.prompts if planned.needs_calibration else ()
    surveys = [SURVEY for step in planned.passes if step.needs_survey]
    exports = [step.name for step in planned.recipe.export]
    names = [*map(prompts, calibrated), *surveys, COMPRESSING, *map(exporting, exports)]
    return names + (_of_check(planned.recipe.check, ["checkpoint", *exports]) if planned.recipe.check else [])


def _of_check(check: Check, artifacts: list[str]) -> list[str]:
    scored = [scoring(artifact, phase, name) for artifact in artifacts for phase in PHASES for name in check.prompts]
    return [*map(prompts, check.prompts), *map(baseline, check.prompts), *scored]
