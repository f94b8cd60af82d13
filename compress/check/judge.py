"""One check from start to end: prompts, baseline, every artifact, rows."""

from pathlib import Path

from compress import prompts
from compress.check import baseline
from compress.check.compare import Row, compare
from compress.errors import InputError
from compress.recipe.check import Check
from compress.runtime.artifacts import Artifact, open_artifact


def check(original: Artifact, artifacts: dict[str, Path], settings: Check, *, seed: int, device: str = "cpu",
        prompt_folder: Path | None = None) -> tuple[list[Row], list[prompts.Used]]:  # fmt: skip
    """Compares each artifact (name -> path) with the original. Returns the rows, and what was used of each prompt set."""
    digest = original.sha256()
    baseline.refuse_long_own_text(original, digest, settings, seed)
    sets = prompts.load_all(original, digest, settings, purpose="check", seed=seed, folder=prompt_folder)
    baseline.refuse_full_disk(original, digest, sets)
    reference = original.candidate()
    baselines = [(prompt_set, baseline.compute(reference, digest, prompt_set)) for prompt_set in sets]
    rows: list[Row] = []
    for name, path in artifacts.items():
        candidate = open_artifact(path, device).candidate()
        if candidate.vocab_size != reference.vocab_size:
            raise InputError(
                f"{path}: its vocabulary has {candidate.vocab_size} tokens, the baseline's {reference.vocab_size}"
            )
        rows += compare(name, candidate, baselines, settings.limits)
    return rows, prompts.used(sets)
