"""What passes must see of the whole model before the first layer is changed: one walk over it, its findings kept for a
run that is resumed."""

import json

import torch

from compress import parallel
from compress.apply import plan, stages
from compress.apply.plan import Plan
from compress.calibration.walk import walk
from compress.disk import json_files
from compress.output_folder.workspace import CALIBRATION, Workspace
from compress.passes import Found, PassContext
from compress.strict.plain import plain
from compress.terminal import progress


@parallel.steady()
def run(planned: Plan, context: PassContext, space: Workspace, windows: list[torch.Tensor] | None) -> Plan:
    """The plan that knows what surveys found; as it is where no pass asks for one."""
    asking = [number for number, step in enumerate(planned.passes) if step.needs_survey]
    found = {number: _found(planned, number, context, space, windows or []) for number in asking}
    return plan.with_found(planned, found, context) if found else planned


def _found(planned: Plan, number: int, context: PassContext, space: Workspace, windows: list[torch.Tensor]) -> Found:
    name = f"{CALIBRATION}/survey-{number}.json"
    path = space.folder / name
    if not space.is_done(name):
        path.parent.mkdir(exist_ok=True)
        with progress.task(stages.SURVEY, planned.model.config.num_hidden_layers) as advance:
            layers = walk(planned.model, windows, space.folder / CALIBRATION / "survey", context.device, advance)
            json_files.write_json(path, plain(planned.passes[number].survey(layers, context)))
        space.mark_done(name)
    else:
        progress.tell("reused from the earlier run: the survey")
    found: Found = json.loads(path.read_text())
    return found
