"""One check from start to end: prompts, baseline, every artifact, rows."""

from dataclasses import dataclass
from pathlib import Path

from compress import prompts
from compress.check import baseline, default_limits, generated, states
from compress.check.baseline import Baseline
from compress.check.compare import Found, compare
from compress.errors import InputError
from compress.recipe.check import Check, MetricName
from compress.runtime.artifacts import Artifact, open_artifact
from compress.runtime.candidates import Overheard, StatefulCandidate


def check(original: Artifact, artifacts: dict[str, Path], settings: Check, *, seed: int, device: str = "cpu",
        prompt_folder: Path | None = None) -> tuple[Found, list[prompts.Used]]:  # fmt: skip
    """Compares each artifact (name -> path) with the original. Returns the figures, and what was used of each prompt set."""
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
    found = Found()
    for name, path in artifacts.items():
        found.add(_compared(name, path, open_artifact(path, device), against))
    return found, prompts.used(sets)


@dataclass
class Against:
    """What an artifact is compared with: log-probabilities, states, and texts where they are asked for."""

    original: Artifact
    reference: StatefulCandidate
    sha256: str
    sets: list[tuple[prompts.PromptSet, Baseline]]
    settings: Check
    texts: tuple[generated.Task, list[generated.Text]] | None = None

    def limits(self, artifact: Artifact) -> dict[MetricName, float]:
        """Those that are named, and where they are asked for those that follow from its formats."""
        if not self.settings.limited_by_default:
            return self.settings.limits
        return default_limits.of(self.original, artifact) | self.settings.limits


def _against(original: Artifact, digest: str, sets: list[prompts.PromptSet], settings: Check) -> Against:
    reference = original.candidate()
    computed = [(found, baseline.compute(reference, digest, found)) for found in sets]
    return Against(original, reference, digest, computed, settings)


def _compared(name: str, path: Path, artifact: Artifact, against: Against) -> Found:
    found = _scored(name, path, artifact, against)
    if against.texts is not None:
        task, before = against.texts
        found.generated = generated.figures(name, task, before, generated.generate(name, artifact, task))
    return found


def _scored(name: str, path: Path, artifact: Artifact, against: Against) -> Found:
    """All but texts, which take as much memory again when this has returned."""
    settings, vocab_size, limits = against.settings, against.reference.vocab_size, against.limits(artifact)
    candidate = artifact.candidate(settings.prefill)
    if candidate.vocab_size != vocab_size:
        raise InputError(f"{path}: its vocabulary has {candidate.vocab_size} tokens, the baseline's {vocab_size}")
    if not states.are_watched(settings.states, artifact.config):
        return compare(name, candidate, against.sets, limits)
    places = states.Places.of(artifact.config, settings.prefill)
    before = states.of_baseline(against.reference, against.sha256, [found for found, _ in against.sets], places)
    watch = states.Watch(places)
    found = compare(name, Overheard(candidate, watch.hear), against.sets, limits)
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
