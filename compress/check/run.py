"""One check from start to end: prompts, baseline, every artifact, rows."""

from dataclasses import dataclass
from pathlib import Path

from compress import progress, prompts, source
from compress.check import baseline
from compress.check.compare import Row, compare
from compress.check.runners import Candidate, CheckpointCandidate, OnnxCandidate
from compress.check.settings import Check
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError


@dataclass(frozen=True)
class BaselineSource:
    """The original model and the digest that keys what is computed from it."""

    checkpoint: Checkpoint
    weights_sha256: str


def open_candidate(path: Path, device: str = "cpu") -> Candidate:
    """A checkpoint folder, or a model.onnx."""
    if path.suffix == ".onnx":
        return OnnxCandidate(path)
    return CheckpointCandidate(Checkpoint(path, allow_quantized=True).model, device)


def run(original: BaselineSource, artifacts: dict[str, Path], settings: Check, *, seed: int, device: str = "cpu",
        prompt_folder: Path | None = None) -> tuple[list[Row], list[dict]]:  # fmt: skip
    """Compares each artifact (name -> path) with the original. Returns the rows, and what was used of each prompt set."""
    sets = [_prompt_set(name, original, settings, seed, device, prompt_folder) for name in settings.prompts]
    model = original.checkpoint.model
    baselines = [(s, baseline.compute(model, original.weights_sha256, s, device)) for s in sets]
    rows: list[Row] = []
    for name, path in artifacts.items():
        candidate = open_candidate(path, device)
        if candidate.vocab_size != model.config.vocab_size:
            raise InputError(
                f"{path}: its vocabulary has {candidate.vocab_size} tokens, the baseline's {model.config.vocab_size}"
            )
        rows += compare(name, candidate, baselines, settings.limits)
    return rows, [{"name": s.name, "windows": len(s.windows), "tokens": s.tokens} for s in sets]


def _prompt_set(name: str, original: BaselineSource, settings: Check, seed: int, device: str, folder: Path | None):
    tokenizer = None if name == "self" else source.load_tokenizer(original.checkpoint.folder)
    with progress.task(f"prompts: {name}", settings.samples * settings.length) as advance:
        return prompts.load(
            name, purpose="check", tokenizer=tokenizer, model=original.checkpoint.model, weights_sha256=original.weights_sha256,
            samples=settings.samples, length=settings.length, seed=seed, folder=folder, device=device, progress=advance,
        )  # fmt: skip
