"""What passes can only decide on the finished checkpoint: after the last shard, before anything is made of it."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from compress import parallel
from compress.apply import plan
from compress.apply.plan import Plan
from compress.apply.process import peak_rss_bytes
from compress.apply.sweep import Swept
from compress.check.state_costs import StateCosts
from compress.checkpoint.reader import CHECKPOINT, Checkpoint
from compress.disk import json_files
from compress.model import records
from compress.model.hybrid import HybridModel
from compress.output_folder.workspace import CALIBRATION, Workspace
from compress.passes import Cost, PassContext
from compress.terminal import progress

JOURNAL, STATES = f"{CALIBRATION}/costs.json", "settling"


@parallel.steady()
def run(
    planned: Plan, context: PassContext, space: Workspace, windows: list[torch.Tensor], swept: Swept,
    write_config: Callable[[Plan], None],
) -> Plan:  # fmt: skip
    """The plan with everything decided; `swept` hears what was found, and of the time it took. `write_config` makes a
    checkpoint of the shards, as a plan has it."""
    for number, step in enumerate(planned.passes):
        if not step.needs_settling:
            continue
        write_config(planned)
        began, folder = time.monotonic(), space.folder / CALIBRATION / STATES
        finished = _finished(space, windows, folder, context.device)
        options, note = step.settle(finished, replace(context, found=planned.found.get(number)))
        shutil.rmtree(folder, ignore_errors=True)
        planned = plan.settled(planned, number, options, context)
        swept.notes[number].append(note)
        spent = swept.pass_seconds.get(number, 0.0)
        swept.pass_seconds[number], swept.peak_rss_bytes = spent + time.monotonic() - began, peak_rss_bytes()
    return planned


def _finished(space: Workspace, windows: list[torch.Tensor], folder: Path, device: str) -> StateCosts:
    model = Checkpoint(space.folder / CHECKPOINT, allow_quantized=True).model
    return StateCosts(model, _unrounded(model), windows, folder, device, _Journal(space))


def _unrounded(model: HybridModel) -> HybridModel:
    values = records.without_states(model.config_json)
    architecture = type(model.architecture).parse(values, "config.json")
    return replace(model, architecture=architecture, config_json=values)


class _Journal:
    """Costs in a file of the work folder; those of an interrupted run are there."""

    def __init__(self, space: Workspace):
        self._space, self._costs = space, dict[str, Cost]()
        if space.is_done(JOURNAL):
            read = json.loads((space.folder / JOURNAL).read_text())
            self._costs = {key: Cost(math.nan if loss is None else loss, drift) for key, (loss, drift) in read.items()}
            progress.tell(f"reused from the earlier run: {len(read)} measurements of states")

    def get(self, key: str) -> Cost | None:
        return self._costs.get(key)

    def put(self, costs: dict[str, Cost]) -> None:
        self._costs |= costs
        (self._space.folder / CALIBRATION).mkdir(exist_ok=True)
        json_files.write_json(self._space.folder / JOURNAL, self._costs)
        self._space.mark_done(JOURNAL)
