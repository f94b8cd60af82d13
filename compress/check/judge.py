"""One check from start to end: prompts, baseline, every artifact, rows."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from compress import prompts
from compress.check import auditing, baseline, default_limits, generated, old, remarks, states, tasks, worst
from compress.check.baseline import Baseline
from compress.check.compare import Found, compare, of_tasks
from compress.check.expected import expected
from compress.check.statistics import Array
from compress.check.tasks import Answered
from compress.errors import InputError
from compress.prompts import task_files
from compress.prompts.task_files import Task
from compress.recipe.check import Check
from compress.runtime.artifacts import Artifact, open_artifact
from compress.runtime.candidates import Overheard, StatefulCandidate
from compress.terminal import progress


def check(original: Artifact, artifacts: dict[str, Path], settings: Check, *, seed: int, device: str = "cpu",
        prompt_folder: Path | None = None, is_old: bool = False) -> tuple[Found, list[prompts.Used]]:  # fmt: skip
    """Compares each artifact (name -> path) with the original. Returns the figures, and what was used of each prompt set. An
    original that `is_old` is itself an artifact, which is measured in decode, too."""
    opened, found = {name: open_artifact(path, device) for name, path in artifacts.items()}, Found()
    for name, artifact in opened.items() if settings.audit else ():
        found.add(auditing.audited(name, original, artifact, seed, device))
    digest = original.sha256()
    baseline.refuse_long_own_text(original, digest, settings, seed)
    sets = prompts.load_all(original, digest, settings, purpose="check", seed=seed, folder=prompt_folder,
                            asking=settings.recall)  # fmt: skip
    _refuse_nothing_to_decode(sets, settings.prefill)
    baseline.refuse_full_disk(original, digest, sets)
    against = _against(original, digest, sets, settings)
    if settings.generate is not None:
        task = generated.task(original, sets, settings.generate)
        against.texts = task, generated.of_baseline(original, digest, task)
    found.remarks += _with_tasks(against, original, digest, prompt_folder)
    for name, artifact in opened.items():
        limited = replace(against, settings=_limited(name, original, artifact, settings, found.remarks))
        found.add(_compared(name, artifacts[name], artifact, limited))
    if is_old:
        found.text += old.decoded(original, digest, against.sets, settings.prefill)
    return found, prompts.used(sets)


@dataclass
class Against:
    """What an artifact is compared with: log-probabilities, states, texts and answers where they are asked for."""

    original: Artifact
    reference: StatefulCandidate
    sha256: str
    sets: list[tuple[prompts.PromptSet, Baseline]]
    settings: Check
    texts: tuple[generated.Task, list[generated.Text]] | None = None
    tasks: list[tuple[Task, Array]] = field(default_factory=list)


def _against(original: Artifact, digest: str, sets: list[prompts.PromptSet], settings: Check) -> Against:
    reference = original.candidate()
    scored = [(found, baseline.compute(reference, digest, found)) for found in sets]
    return Against(original, reference, digest, scored, settings)


def _with_tasks(against: Against, original: Artifact, digest: str, folder: Path | None) -> list[str]:
    """Adds what the original answers; returns warnings of texts that are too long for it."""
    found, warnings = task_files.load_all(against.settings.tasks, original.folder, original.config, folder)
    for warning in warnings:
        progress.warn(warning)
    against.tasks = [(task, tasks.of_baseline(against.reference, digest, task)) for task in found]
    return warnings


def _limited(name: str, original: Artifact, artifact: Artifact, settings: Check, remarks: list[str]) -> Check:
    """The settings with limits for this artifact, where they are to follow from its formats."""
    if not settings.limited_by_default:
        return settings
    costs = expected(original, artifact)
    remarks.append(default_limits.sentence(name, costs))
    return settings.with_limits(default_limits.limits(costs) | settings.limits)


def _compared(name: str, path: Path, artifact: Artifact, against: Against) -> Found:
    found = _scored(name, path, artifact, against)
    found.remarks = list(remarks.remarks(found, lambda: artifact.sha256() == against.sha256))
    worst.tell(found.worst_prompts, [of_set for of_set, _ in against.sets], against.original, against.sha256, artifact)
    if against.texts is not None:
        task, before = against.texts
        found.generated = generated.figures(name, task, before, generated.generate(name, artifact, task))
    return found


def _scored(name: str, path: Path, artifact: Artifact, against: Against) -> Found:
    """All but texts, which take as much memory again when this has returned."""
    candidate, vocab_size = artifact.candidate(against.settings.prefill), against.reference.vocab_size
    if candidate.vocab_size != vocab_size:
        raise InputError(f"{path}: its vocabulary has {candidate.vocab_size} tokens, the baseline's {vocab_size}")
    found = _on_text(name, artifact, candidate, against)
    answered = [Answered(task, before, tasks.right(name, candidate, task)) for task, before in against.tasks]
    found.add(of_tasks(name, answered, against.settings.limits))
    return found


def _on_text(name: str, artifact: Artifact, candidate: StatefulCandidate, against: Against) -> Found:
    """Figures of the prompt sets, and of states while they are decoded."""
    settings = against.settings
    if not states.are_watched(settings.states, artifact.config):
        return compare(name, candidate, against.sets, settings.limits)
    places = states.Places.of(artifact.config, settings.prefill)
    before = states.of_baseline(against.reference, against.sha256, [found for found, _ in against.sets], places)
    watch = states.Watch(places)
    found = compare(name, Overheard(candidate, watch.hear), against.sets, settings.limits)
    found.state_health = states.health(name, watch.sizes, before)
    found.state_saturation = watch.saturation(name)
    return found


def _refuse_nothing_to_decode(sets: list[prompts.PromptSet], prefill: int) -> None:
    for prompt_set in sets:
        longest = max(map(len, prompt_set.windows))
        if longest < prefill + 2:
            raise InputError(
                f"prompts '{prompt_set.name}': prefill {prefill} leaves nothing to decode and score of its windows, "
                f"of which the longest has {longest} tokens"
            )
