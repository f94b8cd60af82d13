"""One check from start to end: prompts, baseline, every artifact, rows."""

from pathlib import Path

from compress import prompts
from compress.check import baseline
from compress.check.compare import Found, compare
from compress.errors import InputError
from compress.recipe.check import Check
from compress.runtime.artifacts import Artifact, open_artifact


def check(original: Artifact, artifacts: dict[str, Path], settings: Check, *, seed: int, device: str = "cpu",
        prompt_folder: Path | None = None) -> tuple[Found, list[prompts.Used]]:  # fmt: skip
    """Compares each artifact (name -> path) with the original. Returns the figures, and what was used of each prompt set."""
    digest = original.sha256()
    baseline.refuse_long_own_text(original, digest, settings, seed)
    sets = prompts.load_all(original, digest, settings, purpose="check", seed=seed, folder=prompt_folder,
                            asking=settings.recall)  # fmt: skip
    _refuse_nothing_to_decode(sets, settings.prefill)
    baseline.refuse_full_disk(original, digest, sets)
    reference = original.candidate()
    baselines = [(prompt_set, baseline.compute(reference, digest, prompt_set)) for prompt_set in sets]
    found = Found()
    for name, path in artifacts.items():
        candidate = open_artifact(path, device).candidate(settings.prefill)
        if candidate.vocab_size != reference.vocab_size:
            raise InputError(
                f"{path}: its vocabulary has {candidate.vocab_size} tokens, the baseline's {reference.vocab_size}"
            )
        found.add(compare(name, candidate, baselines, settings.limits))
    return found, prompts.used(sets)


def _refuse_nothing_to_decode(sets: list[prompts.PromptSet], prefill: int) -> None:
    for prompt_set in sets:
        longest = max(map(len, prompt_set.windows))
        if longest < prefill + 2:
            raise InputError(
                f"prompts '{prompt_set.name}': prefill {prefill} leaves nothing to decode and score of its windows, "
                f"of which the longest has {longest} tokens"
            )
