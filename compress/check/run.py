"""One check from start to end: prompts, baseline, every artifact, rows."""

from pathlib import Path

from compress import progress, prompts, source
from compress.artifacts import Artifact, open_artifact
from compress.check import baseline
from compress.check.compare import Row, compare
from compress.check.settings import Check
from compress.errors import InputError
from compress.prompts.windows import refuse_foreign_tokens


def run(original: Artifact, artifacts: dict[str, Path], settings: Check, *, seed: int, device: str = "cpu",
        prompt_folder: Path | None = None) -> tuple[list[Row], list[dict]]:  # fmt: skip
    """Compares each artifact (name -> path) with the original. Returns the rows, and what was used of each prompt set."""
    digest = original.sha256()
    sets = [_prompt_set(name, original, digest, settings, seed, prompt_folder) for name in settings.prompts]
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
    return rows, [{"name": s.name, "windows": len(s.windows), "tokens": s.tokens} for s in sets]


def _prompt_set(name: str, original: Artifact, digest: str, settings: Check, seed: int, folder: Path | None):
    tokenizer = None if name == "self" else source.load_tokenizer(original.folder)
    with progress.task(f"prompts: {name}", settings.samples * settings.length) as advance:
        prompt_set = prompts.load(
            name, purpose="check", tokenizer=tokenizer, model=original, model_sha256=digest,
            samples=settings.samples, length=settings.length, seed=seed, folder=folder, progress=advance,
        )  # fmt: skip
    refuse_foreign_tokens(max(int(window.max()) for window in prompt_set.windows), original.config.vocab_size)
    return prompt_set
