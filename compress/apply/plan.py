"""What a recipe will do to a model, worked out before any weight is read: formats, sizes, what must fit where."""

import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from compress import prompts
from compress.apply import ranging
from compress.check import baseline
from compress.checkpoint.end_tokens import of_generation_config
from compress.checkpoint.reader import Checkpoint, has_weights, model_of_config
from compress.disk import cache, files
from compress.errors import InputError
from compress.model import sizes
from compress.model.hybrid import HybridModel
from compress.model.weight import Unit
from compress.output_folder import destination
from compress.passes import Fact, Found, Pass, PassContext
from compress.prompts import recall, task_files
from compress.recipe.calibration import Calibration
from compress.recipe.check import Check
from compress.recipe.recipe import PassStep, Recipe
from compress.recipe.source import Source
from compress.runtime import memory, runtimes
from compress.runtime.onnx_session import LOAD_FACTOR
from compress.strict import yaml_text
from compress.strict.models import Strict
from compress.terminal.escaping import printable

TRIED_TOGETHER = 8  # ways to keep the states of a layer, at most
SPARE = 1.02  # room for headers, graph and report beside the weights


@dataclass(frozen=True)
class Plan:
    """The opened source, and the model as each pass will leave it (lazily: nothing has been computed)."""

    source: Source
    checkpoint: Checkpoint | None  # None where there is only a config.json, which is enough for a plan
    stages: tuple[HybridModel, ...]  # as it came, and after each pass
    recipe: Recipe
    found: dict[int, Found] = field(default_factory=dict)  # by the pass's number: what its survey found

    @property
    def opened(self) -> Checkpoint:
        """The checkpoint, where the plan is carried out."""
        assert self.checkpoint is not None, "a plan of a config.json alone is only shown"
        return self.checkpoint

    @property
    def model(self) -> HybridModel:
        """As it came."""
        return self.stages[0]

    @property
    def result(self) -> HybridModel:
        """As it will be stored."""
        return self.stages[-1]

    @property
    def units(self) -> tuple[Unit, ...]:
        return self.result.units

    @property
    def source_bytes(self) -> int:
        return self.checkpoint.files.bytes if self.checkpoint else sizes.stored_bytes(self.model.units)

    @property
    def checkpoint_bytes(self) -> int:
        return sizes.stored_bytes(self.units)

    def export_bytes(self) -> dict[str, int]:
        return {step.name: step.bound().predict_bytes(self.units) for step in self.recipe.export}

    def built_bytes(self) -> int:
        """Of what is built beside exported weights, at most."""
        return sum(step.bound().most_built_bytes(self.units) for step in self.recipe.export)

    @cached_property
    def _fitted(self) -> list[tuple[Pass[Strict], tuple[str, ...]]]:
        """Every pass as it applies to this model, and what is different from what its options say."""
        return [step.bound().fitted(self.model) for step in self.recipe.passes]

    @property
    def passes(self) -> list[Pass[Strict]]:
        """As they apply to this model."""
        return [fitted for fitted, _ in self._fitted]

    @property
    def notes(self) -> list[tuple[str, ...]]:
        """For every pass, sentences on what this model makes of its options."""
        return [said for _, said in self._fitted]

    @property
    def changes(self) -> list[Fact]:
        """What whoever uses the model must know of what passes do to it."""
        steps = zip(self.passes, self.stages[:-1], self.stages[1:], strict=True)
        return [
            fact
            for number, (step, before, after) in enumerate(steps)
            for fact in step.changes(before, after, self.found.get(number))
        ]

    @property
    def needs_calibration(self) -> bool:
        return any(step.needs_calibration for step in self.passes)

    @property
    def needs_settling(self) -> bool:
        return any(step.needs_settling for step in self.passes)

    @property
    def needs_ranges(self) -> bool:
        return any(step.bound().needs_ranges for step in self.recipe.export)

    @property
    def needs_windows(self) -> bool:
        """Whether calibration tokens are read: to calibrate on, to settle by, or to export by."""
        return self.needs_calibration or self.needs_settling or self.needs_ranges

    @property
    def calibration(self) -> Calibration:
        return self.recipe.calibration or Calibration()

    def calibration_bytes(self) -> int:
        """Hidden states on disk: before a layer, between its blocks and after it, and what passes keep while they work on
        a layer: more states, and the layer as they leave it. To settle: before every layer, and of what is tried. To export:
        of one layer."""
        tokens = len(self.calibration.prompts) * self.calibration.samples * self.calibration.length
        of_model = 4 * tokens * self.model.config.hidden_size
        settling = of_model * (self.model.config.num_hidden_layers + 1 + TRIED_TOGETHER) if self.needs_settling else 0
        calibrating = self._calibrating_bytes(of_model) if self.needs_calibration else 0
        return max(settling, calibrating, of_model if self.needs_ranges else 0)

    def _calibrating_bytes(self, of_model: int) -> int:
        more = [step.scratch_states for step in self.passes]
        left = [stage for stage, states in zip(self.stages[1:], more, strict=True) if states]
        kept = sum(max(unit.stored_bytes() for unit in stage.units) for stage in left)
        return (3 + max(more)) * of_model + kept

    def check_bytes(self) -> int:
        """Log-probabilities and hidden states of the baseline on disk."""
        if self.recipe.check is None:
            return 0
        check, config = self.recipe.check, self.model.config
        tokens = [_tokens_of(name, check) for name in check.prompts]
        return baseline.bytes_needed(sum(tokens), config.vocab_size) + 4 * max(tokens) * config.hidden_size


def _tokens_of(name: str, check: Check) -> int:
    """At most, of one prompt set."""
    if name == "recall" and check.recall is not None:
        return recall.most_tokens(check.recall.distances, check.recall.trials)
    return check.samples * check.length


def make(recipe: Recipe, source: Source, context: PassContext, recipe_folder: Path, needs_weights: bool = True) -> Plan:
    """Opens the source and refuses everything that headers and configuration tell."""
    checkpoint = Checkpoint(source.folder) if needs_weights or has_weights(source.folder) else None
    model = checkpoint.model if checkpoint else model_of_config(source.folder)
    plan = with_found(Plan(source, checkpoint, (model,), recipe), {}, context)
    of_generation_config(source.folder)  # refuses one that cannot be read
    folder, calibration = source.folder if checkpoint else None, plan.calibration if plan.needs_windows else None
    if folder is not None:
        for step in recipe.export:
            ranging.refuse_without_text(step.bound(), step.name, folder, plan.calibration)
    for purpose, settings in (("check", recipe.check), ("calibration", calibration)):
        if settings is not None:
            for name in settings.prompts:
                asking = settings.recall if isinstance(settings, Check) else None
                prompts.refuse_unusable(
                    name, folder, recipe_folder, length=settings.length, purpose=purpose, asking=asking
                )
    _refuse_unusable_tasks(recipe.check, folder, model, recipe_folder)
    _refuse_shared_prompts(recipe, calibration, recipe_folder)
    for step in recipe.export:
        step.bound().refuse(plan.result)
    refuse_short_windows(plan, plan.calibration.length, "calibration.length is")
    return plan


def _refuse_unusable_tasks(check: Check | None, folder: Path | None, model: HybridModel, recipe_folder: Path) -> None:
    """As prompts: without a model folder only the names are looked at."""
    asked = check.tasks if check else ()
    for name in asked:
        task_files.find(name, recipe_folder)
    if folder is not None:
        task_files.load_all(asked, folder, model.config, recipe_folder)


def refuse_short_windows(plan: Plan, longest: int, said: str) -> None:
    """Calibration windows of which none has the tokens that a pass needs; `said` stands before their length."""
    for number, step in enumerate(plan.passes):
        if plan.needs_windows and longest < step.least_window:
            raise InputError(
                f"passes.{number}.{plan.recipe.passes[number].name} needs calibration windows of {step.least_window} tokens "
                f"or more, but {said} {longest}"
            )


def with_found(plan: Plan, found: dict[int, Found], context: PassContext) -> Plan:
    """The plan with every stage worked out, knowing what surveys found."""
    stages = [plan.model]
    for number, step in enumerate(plan.passes):
        _refuse_order(plan, number)
        step.requires(stages[-1])
        stages.append(step.restructure(stages[-1], replace(context, found=found.get(number))))
    return replace(plan, stages=tuple(stages), found=found)


def settled(plan: Plan, number: int, options: Strict, context: PassContext) -> Plan:
    """The plan with other options for one of its passes."""
    steps = list(plan.recipe.passes)
    steps[number] = steps[number].model_copy(update={"options": options})
    recipe = plan.recipe.model_copy(update={"passes": tuple(steps)})
    return with_found(replace(plan, recipe=recipe), plan.found, context)


def _refuse_order(plan: Plan, number: int) -> None:
    """A survey is of the model as it came. What it will find is not known before the run to a pass that changes which tensors
    there are by calibration too."""
    name, step = plan.recipe.passes[number].name, plan.passes[number]
    if number and step.needs_survey:
        raise InputError(f"passes.{number}.{name} surveys the model as it came: it must be the first pass")
    decides = step.restructures and step.needs_calibration and not step.follows_surveys
    if decides and any(earlier.needs_survey for earlier in plan.passes[:number]):
        raise InputError(f"passes.{number}.{name} cannot follow a pass that shares a budget among layers")


def _refuse_shared_prompts(recipe: Recipe, calibration: Calibration | None, recipe_folder: Path) -> None:
    """A model is not judged on what tuned it, under whatever name; generated sets are seeded apart."""
    if recipe.check is None or calibration is None:
        return
    judged = {prompts.file_of(name, recipe_folder) for name in recipe.check.prompts} - {None}
    judged |= {task_files.find(name, recipe_folder).resolve() for name in recipe.check.tasks}
    for name in calibration.prompts:
        if prompts.file_of(name, recipe_folder) in judged:
            raise InputError(f"prompts '{name}': calibration and check would read the same text")


def shortages(plan: Plan, out: Path) -> list[str]:
    """What will not fit: output and baseline on the disks they go to, and an export that is to be checked in memory."""
    output = int(SPARE * (plan.checkpoint_bytes + sum(plan.export_bytes().values())))
    output += plan.built_bytes() + plan.calibration_bytes()
    needs = [(_existing(out), output - max(0, files.size(destination.partial_of(out))), "the output")]
    if plan.recipe.check is not None:
        needs.append((_existing(cache.location("baseline")), plan.check_bytes(), "the baseline's log-probabilities"))
    disks: dict[int, list[tuple[Path, int, str]]] = {}
    for need in needs:
        disks.setdefault(need[0].stat().st_dev, []).append(need)
    found = [*map(_disk_shortage, disks.values()), _memory_shortage(plan)]
    return [shortage for shortage in found if shortage]


def _disk_shortage(needs: list[tuple[Path, int, str]]) -> str | None:
    """Needs on one file system count together."""
    need = sum(size for _, size, _ in needs)
    free = min(shutil.disk_usage(folder).free for folder, _, _ in needs)
    if need <= free:
        return None
    what = " and ".join(what for _, _, what in needs)
    return f"{needs[0][0]}: {need / 2**20:,.0f} MiB are needed for {what}, {free / 2**20:,.0f} MiB are free"


def _memory_shortage(plan: Plan) -> str | None:
    """A checked ONNX artifact is loaded whole; said now rather than after the work."""
    if plan.recipe.check is None or not plan.recipe.export:
        return None
    need, total = LOAD_FACTOR * max(plan.export_bytes().values()), memory.total()
    if need <= total:
        return None
    return f"the check loads the export, which takes about {need / 2**30:.1f} GiB of {total / 2**30:.1f} GiB of memory; use check=null"


def _existing(path: Path) -> Path:
    path = Path(os.path.realpath(path))
    return next(p for p in (path, *path.parents) if os.path.isdir(p))  # noqa: PTH112 - a name may be too long


def describe(plan: Plan, out: Path) -> str:
    """The plan as text, for --dry-run."""
    destination.refuse_unusable(destination.resolve(out))
    model, check = plan.model, plan.recipe.check
    active = sizes.active_parameters(model.architecture, model.units)
    counts = Counter(weight.format for unit in plan.units for weight in unit.weights.values())
    lines = [
        f"model     {plan.source.name} ({model.model_type}), {plan.source_bytes:,} bytes",
        f"          {model.parameters:,} parameters, {active:,} active",
        *(line for step in plan.recipe.passes for line in _pass_lines(step)),
        *(
            f"note      {step.name}: {said}"
            for step, notes in zip(plan.recipe.passes, plan.notes, strict=True)
            for said in notes
        ),
        *(f"{fact.about:<9} {fact.text}" for fact in plan.changes),
        *(f"travels   {fact}" for fact in sizes.travelling(plan.result)),
        *(f"stored    {tensors} tensors as {name}" for name, tensors in sorted(counts.items())),
        _size_line(out / "checkpoint", plan.checkpoint_bytes, model.parameters),
        *(_size_line(out / kind, size, model.parameters) for kind, size in plan.export_bytes().items()),
        *(
            f"builds    {out / step.name}: {made}"
            for step in plan.recipe.export
            for made in step.bound().plans(plan.result)
        ),
        *(f"loads in  {line}" for line in runtimes.as_lines(runtimes.of(plan.result, plan.recipe.export))),
    ]
    if plan.needs_windows:
        asked = plan.calibration
        lines.append(
            f"calibrate {', '.join(asked.prompts)}: up to {asked.samples} windows of {asked.length} tokens from each"
        )
    lines += [f"short     {shortage}" for shortage in shortages(plan, out)]
    if check is None:
        return _as_lines([*lines, "check     off"])
    named = ", ".join(f"{name} {value:g}" for name, value in check.limits.items()) or "no limits"
    limits = "limits by what the formats are expected to cost" if check.limited_by_default else named
    lines += [
        f"check     {', '.join(check.prompts)}: up to {check.samples} windows of {check.length} tokens from each; {limits}",
        *_check_lines(check),
        f"          needs {plan.check_bytes():,} bytes of cache on disk",
    ]
    return _as_lines(lines)


def _check_lines(check: Check) -> list[str]:
    """What is asked for beyond what every check does."""
    lines = [f"          decodes after a prompt of {check.prefill} tokens"] if check.prefill else []
    if check.recall is not None and "recall" in check.prompts:
        distances = ", ".join(map(str, check.recall.distances))
        lines.append(
            f"          recall: at least {check.recall.trials} questions at each distance of {distances} tokens"
        )
    if check.tasks:
        lines.append(f"          tasks: {', '.join(check.tasks)}")
    if check.generate is not None:
        asked = check.generate
        lines.append(
            f"          generates {asked.prompts} texts of up to {asked.tokens} tokens, each from {asked.prompt_tokens} tokens"
        )
    return lines


def _pass_lines(step: PassStep) -> list[str]:
    """A pass as it may stand in a recipe: the keys that have an effect."""
    first, *rest = yaml_text.dump({step.name: step.options.in_force()}).splitlines()
    return [f"pass      {first}", *(f"          {line}" for line in rest)]


def _as_lines(lines: list[str]) -> str:
    """One line each, whatever characters a name of a model, a folder or a file of prompts holds."""
    return "\n".join(map(printable, lines))


def _size_line(path: Path, size: int, parameters: int) -> str:
    return f"writes    {path}: about {size:,} bytes of weights ({size / (4 * parameters):.3f} of float32)"
