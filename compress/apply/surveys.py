"""What passes must see of the whole model before the first layer is changed: one walk over it, its findings kept for a
run that is resumed."""

import json

import torch

from compress import parallel, passes
from compress.apply import plan, stages
from compress.apply.plan import PassContext, Plan
from compress.calibration.walk import walk
from compress.disk import json_files
from compress.output_folder.workspace import CALIBRATION, Workspace
from compress.terminal import progress


@parallel.steady()
def run(planned: Plan, context: PassContext, space: Workspace, windows: list[torch.Tensor] | None) -> Plan:
    """The plan that knows what surveys found; as it is where no pass asks for one."""
    asking = [place for place, step in enumerate(planned.modules) if passes.needs_survey(*step)]
    found = {place: _found(planned, place, context, space, windows) for place in asking}
    return plan.with_found(planned, found, context) if found else planned


def _found(planned: Plan, place: int, context: PassContext, space: Workspace, windows: list[torch.Tensor]) -> dict:
    name = f"{CALIBRATION}/survey-{place}.json"
    path = space.folder / name
    if not space.is_done(name):
        path.parent.mkdir(exist_ok=True)
        module, options = planned.modules[place]
        with progress.task(stages.SURVEY, planned.model.config.num_hidden_layers) as advance:
            layers = walk(planned.model, windows, space.folder / CALIBRATION / "survey", context.device, advance)
            json_files.write_json(path, module.survey(options, layers, context))
        space.mark_done(name)
    else:
        progress.tell("reused from the earlier run: the survey")
    return json.loads(path.read_text())
