"""One sweep over a model's units: passes, then the shard. The checkpoint is written layer by layer and nothing is whole in
memory.

Where a pass looks at calibration data, hidden states wait on disk between layers, and every layer is run, once it is
written, from the bytes that were written, so that the next one sees the errors it will see when it ships.
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from compress import parallel
from compress.apply import stages
from compress.apply.plan import Plan
from compress.apply.process import peak_rss_bytes
from compress.calibration import inputs as calibration_inputs
from compress.calibration.inputs import Keep, LayerInputs, UnitInputs
from compress.checkpoint import writer
from compress.checkpoint.reader import CHECKPOINT
from compress.checkpoint.writer import ShardWriter
from compress.disk import json_files
from compress.model.records import Record
from compress.model.weight import Unit, Weight
from compress.output_folder.workspace import CALIBRATION, Workspace
from compress.passes import Details, Note, PassContext
from compress.report.passes import PassDone
from compress.runtime.inference import HiddenStates, embed_windows
from compress.strict.plain import plain
from compress.terminal import progress

Advance = Callable[[int], None]  # hears of parameters
Write = Callable[[int, Path, Advance], tuple[ShardWriter, Callable[[], None]]]  # a unit's shard, and what follows it


@dataclass
class Swept:
    """What a sweep did: seconds per pass that looked at calibration data, notes per pass and unit, layers left as they were."""

    seconds: float = 0.0
    pass_seconds: dict[int, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    notes: list[list[Note]] = field(default_factory=list)
    reused: int = 0
    written: int = 0  # units


@parallel.steady()
def run(planned: Plan, context: PassContext, space: Workspace, windows: list[torch.Tensor] | None) -> Swept:
    """Writes every shard that an earlier run did not finish. `windows` are the calibration tokens, where a pass asks."""
    (space.folder / CHECKPOINT).mkdir(exist_ok=True)
    swept, began = Swept(), time.monotonic()
    with progress.task(stages.COMPRESSING, planned.model.parameters) as advance, _Publisher(space) as publisher:
        write = _plainly(planned) if windows is None else _Calibrated(planned, context, space, windows, swept)
        finished = _finished(planned, space, calibrated=windows is not None)
        if space.is_resumed:
            progress.tell(_reused(planned, finished))
        for number, unit in enumerate(planned.units):
            shard = _shard(planned, number)
            if number in finished:
                swept.reused += unit.name.startswith("layer.")
                advance(sum(weight.parameters for weight in unit.weights.values()))
                continue
            swept.written += 1
            publisher.publish(shard, *write(number, space.folder / shard, advance))
    swept.notes = _notes(space.folder / CALIBRATION, len(planned.passes))
    swept.seconds, swept.peak_rss_bytes = time.monotonic() - began, peak_rss_bytes()
    for states in (space.folder / CALIBRATION).glob("states.*"):
        shutil.rmtree(states)
    return swept


def done(planned: Plan, swept: Swept) -> list[PassDone]:
    """Every pass as the report tells of it. Passes that transform on load share the time of the sweep they run in."""
    return [
        PassDone(
            name=planned.recipe.passes[number].name,
            step=step,
            seconds=swept.pass_seconds.get(number, swept.seconds),
            peak_rss_bytes=swept.peak_rss_bytes,
            details=_as_mapping(step.details(planned.units, swept.notes[number])),
            notes=planned.notes[number],
            layers_reused=swept.reused,
        )
        for number, step in enumerate(planned.passes)
    ]


def _as_mapping(details: object) -> Details:
    """What a pass says of itself, whatever it is: nothing of it is lost."""
    if isinstance(details, Mapping):
        return details
    return {} if details is None else {"details": plain(details)}


def records(planned: Plan, swept: Swept) -> list[Record]:
    """What every pass did to the tensors."""
    found = []
    for number, (step, notes) in enumerate(zip(planned.passes, swept.notes, strict=True)):
        changes = step.records(planned.stages[number], planned.stages[number + 1], notes)
        name = planned.recipe.passes[number].name
        found.append(Record(name=name, changes=None if changes is None else tuple(changes)))
    return found


def _shard(planned: Plan, number: int) -> str:
    return f"{CHECKPOINT}/{writer.shard_name(number, len(planned.units))}"


def _finished(planned: Plan, space: Workspace, *, calibrated: bool) -> set[int]:
    """Units whose shards, and notes, an earlier run finished. Calibration goes on where the states that enter the next unit are
    still there, and begins anew where they are not (a shard was damaged since)."""
    done = [all(map(space.is_done, (*_notes_of(planned, n), _shard(planned, n)))) for n in range(len(planned.units))]
    if not calibrated or all(done):
        return {number for number, is_done in enumerate(done) if is_done}
    first = done.index(False)
    return set(range(first)) if first and space.is_done(_states(first)) else set()


def _reused(planned: Plan, finished: set[int]) -> str:
    layers = [unit.name.startswith("layer.") for unit in planned.units]
    return f"reused from the earlier run: {sum(layers[number] for number in finished)} of {sum(layers)} layers"


def _states(number: int) -> str:
    return f"{CALIBRATION}/states.{number}"


def _note(pass_number: int, number: int) -> str:
    """What a pass noted of a unit."""
    return f"{CALIBRATION}/note-{pass_number}-{number:05d}.json"


def _notes_of(planned: Plan, number: int) -> list[str]:
    """Nothing is noted of an embedding, unit 0, that is no output matrix: nothing reaches it."""
    asking = [pass_number for pass_number, step in enumerate(planned.passes) if step.needs_calibration]
    return (
        [_note(pass_number, number) for pass_number in asking]
        if number or planned.model.config.tie_word_embeddings
        else []
    )


class _Publisher:
    """Publishes shards while the next unit is worked on: waiting for the disk takes as long as rounding. One at a time."""

    def __init__(self, space: Workspace):
        self._space, self._pool = space, ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def publish(self, name: str, shard: ShardWriter, then: Callable[[], None]) -> None:
        """Flushes and renames the shard, notes it as done, and does what may be done only then."""
        self._wait()
        self._pending = self._pool.submit(self._finish, name, shard, then)

    def _finish(self, name: str, shard: ShardWriter, then: Callable[[], None]) -> None:
        shard.publish()
        self._space.mark_done(name)
        then()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def __enter__(self) -> "_Publisher":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            if kind is None:
                self._wait()


def _plainly(planned: Plan) -> Write:
    def write(number: int, path: Path, advance: Advance) -> tuple[ShardWriter, Callable[[], None]]:
        shard = ShardWriter(planned.units[number], path)
        shard.write_all(planned.units[number], advance)
        return shard, lambda: None

    return write


class _Calibrated:
    """Writes one unit after another, each from what the units before it, as written, hand on.

    The states that enter unit n are in `calibration/states.n`; they are complete, and noted, before the shard of unit
    n - 1 is, and are removed when that of unit n is.
    """

    def __init__(
        self, planned: Plan, context: PassContext, space: Workspace, windows: list[torch.Tensor], swept: Swept
    ):
        self._planned, self._context, self._space, self._swept = planned, context, space, swept
        self._windows, self._folder = windows, space.folder / CALIBRATION
        self._states = HiddenStates(self._folder, windows, planned.model.config.hidden_size)
        self._folder.mkdir(exist_ok=True)

    @torch.inference_mode()
    def __call__(self, number: int, path: Path, advance: Advance) -> tuple[ShardWriter, Callable[[], None]]:
        planned, last = self._planned.units[number], number == len(self._planned.units) - 1
        shard = ShardWriter(planned, path)
        kept: dict[str, Weight] = {}

        def keep(weight: Weight) -> Weight:
            shard.write(weight, advance)
            kept[weight.name] = shard.written(weight)
            return kept[weight.name]

        inputs = self._inputs(number, last, keep)
        unit = self._passes(number, inputs)
        for name, weight in unit.weights.items():
            if kept.get(name) is not weight:
                reread = keep(weight)
                unit = unit.replaced(reread) if weight.is_quantized else unit
        if not last:
            self._hand_on(number, unit, inputs)
        return shard, lambda: shutil.rmtree(self._states_folder(number), ignore_errors=True)

    def _inputs(self, number: int, last: bool, keep: Keep) -> UnitInputs | None:
        """Nothing reaches the embedding but tokens, unless it is the output matrix too."""
        model, device = self._planned.model, self._context.device
        if number == 0:
            return calibration_inputs.of_tied_head(model, self._windows, self._folder / "tied", keep, device)
        entering = self._states.at(self._states_folder(number))
        if last:
            return calibration_inputs.of_head(model, entering, keep, device)
        return LayerInputs(model, number - 1, entering, self._folder / "layer", keep, device)

    def _passes(self, number: int, inputs: UnitInputs | None) -> Unit:
        unit = self._planned.model.units[number]
        for pass_number, step in enumerate(self._planned.passes):
            context, began = replace(self._context, found=self._planned.found.get(pass_number)), time.monotonic()
            if inputs is None or not step.needs_calibration:
                unit = step.apply(unit, context)
                continue
            unit, note = step.calibrate(unit, inputs, context)
            inputs.become(self._planned.stages[pass_number + 1])
            json_files.write_json(self._space.folder / _note(pass_number, number), plain(note))
            self._space.mark_done(_note(pass_number, number))
            seconds = self._swept.pass_seconds
            seconds[pass_number] = seconds.get(pass_number, 0.0) + time.monotonic() - began
        return unit

    def _hand_on(self, number: int, unit: Unit, inputs: UnitInputs | None) -> None:
        following = self._states.at(self._states_folder(number + 1))
        if number == 0:
            embed_windows(replace(self._planned.model, units=(unit,)), self._windows, following)
        elif isinstance(inputs, LayerInputs):
            inputs.leave(unit, following)
        following.flush()
        self._space.mark_done(_states(number + 1))

    def _states_folder(self, number: int) -> Path:
        return self._space.folder / _states(number)


def _notes(folder: Path, passes: int) -> list[list[Note]]:
    """What every pass noted of every unit, in an interrupted run too, in order."""
    return [
        [json.loads(path.read_text()) for path in sorted(folder.glob(f"note-{number}-*.json"))]
        for number in range(passes)
    ]
