"""Text for calibration and checks: from a name or a file to windows of token ids.

A prompt set is `heldout` or `prose` (shipped passages), `recall` (seeded tasks), `self` (text sampled from the model
itself), or the path of a .txt or .jsonl file. Calibration and check never share a passage or a seed.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NotRequired, Protocol, TypedDict

import torch

from compress.disk.paths import as_text
from compress.errors import InputError, nearest
from compress.prompts import passages, recall, self_text
from compress.prompts.questions import Asked, Question
from compress.prompts.seeds import derive_seed
from compress.prompts.windows import join_and_cut, refuse_foreign_tokens, too_long
from compress.recipe.check import Recall
from compress.recipe.source import load_tokenizer
from compress.recipe.tokenizer import Tokenizer
from compress.runtime.artifacts import Artifact
from compress.terminal.progress import Advance, warn
from compress.terminal.progress import task as progress_task

SHIPPED = ("prose", "heldout")
NAMES = (*SHIPPED, "recall", "self")


def stage(name: str) -> str:
    """What the progress of loading a set is shown under."""
    return f"prompts: {as_text(name)}"


@dataclass(frozen=True)
class PromptSet:
    name: str
    windows: list[torch.Tensor]  # token ids, int64, [length] each
    warning: str | None = None
    questions: tuple[Question, ...] = ()  # of `recall`

    @property
    def tokens(self) -> int:
        return sum(len(window) for window in self.windows)


class Settings(Protocol):
    """What a check and a calibration say of prompts."""

    @property
    def prompts(self) -> tuple[str, ...]: ...

    @property
    def samples(self) -> int: ...

    @property
    def length(self) -> int: ...


class Used(TypedDict):
    """What a report says of a set."""

    name: str
    windows: int
    tokens: int
    warning: NotRequired[str]


def refuse_unusable(name: str, model_folder: Path | None, folder: Path | None = None, *, length: int,
                    purpose: str = "check", asking: Recall | None = None) -> None:  # fmt: skip
    """Refuses, before any work, a set that is not known, a file that cannot be read as one, or text without a tokenizer.

    Without `model_folder` only the name is looked at.
    """
    path = None if name in NAMES else _find_file(name, folder, purpose)
    if model_folder is None or name == "self":
        return
    tokenizer = load_tokenizer(model_folder)
    if path is not None:
        passages.from_file(path, tokenizer)
    if name == "recall" and asking is None:
        recall.windows(tokenizer, ["Any text."], samples=1, length=length, seed=0)
    elif name == "recall":
        recall.at_distances(tokenizer, ["Any text."], distances=[0], trials=1, seed=0)


def load(name: str, *, purpose: str, tokenizer: Tokenizer | None, model: Artifact | None, model_sha256: str, samples: int,
         length: int, seed: int, folder: Path | None = None, progress: Advance | None = None,
         asking: Recall | None = None) -> PromptSet:  # fmt: skip
    """At most `samples` windows of `length` tokens. `purpose` (`check` or `calibration`) separates the seeds. `recall` is as
    long as `asking` needs, where that is given."""
    seed = derive_seed(seed, purpose, as_text(name))
    if name == "self":
        assert model is not None  # which writes the text
        found = Asked(self_text.windows(model, model_sha256, samples, length, seed, progress), ())
    else:
        assert tokenizer is not None  # all else is text
        if name == "recall":
            found = _recall(purpose, tokenizer, samples, length, seed, asking)
        else:
            found = Asked(_of_text(name, purpose, tokenizer, samples, length, seed, folder), ())
    if not any(len(window) > 1 for window in found.windows):
        raise InputError(f"prompts '{name}': not enough text for a single window of 2 tokens")
    return PromptSet(as_text(name), found.windows, questions=found.questions)


def _recall(purpose: str, tokenizer: Tokenizer, samples: int, length: int, seed: int, asking: Recall | None) -> Asked:
    filler = passages.shipped("heldout" if purpose == "check" else "prose")
    if asking is not None:
        return recall.at_distances(tokenizer, filler, asking.distances, asking.trials, seed)
    return recall.windows(tokenizer, filler, samples, length, seed)


def _of_text(name: str, purpose: str, tokenizer: Tokenizer, samples: int, length: int, seed: int,
             folder: Path | None) -> list[torch.Tensor]:  # fmt: skip
    is_shipped = name in SHIPPED
    texts = passages.shipped(name) if is_shipped else passages.from_file(_find_file(name, folder, purpose), tokenizer)
    return join_and_cut(tokenizer, texts, samples, length, seed)


def load_all(
    model: Artifact, model_sha256: str, settings: Settings, *, purpose: str, seed: int, folder: Path | None = None,
    asking: Recall | None = None,
) -> list[PromptSet]:  # fmt: skip
    """The sets that `settings` names, for a model."""
    return [_load_for(model, model_sha256, name, settings, purpose, seed, folder, asking) for name in settings.prompts]


def _load_for(
    model: Artifact, model_sha256: str, name: str, settings: Settings, purpose: str, seed: int, folder: Path | None,
    asking: Recall | None,
) -> PromptSet:  # fmt: skip
    tokenizer = None if name == "self" else load_tokenizer(model.folder)
    with progress_task(stage(name), settings.samples * settings.length) as advance:
        prompt_set = load(
            name, purpose=purpose, tokenizer=tokenizer, model=model, model_sha256=model_sha256,
            samples=settings.samples, length=settings.length, seed=seed, folder=folder, progress=advance,
            asking=asking,
        )  # fmt: skip
    refuse_foreign_tokens(max(int(window.max()) for window in prompt_set.windows), model.config.vocab_size)
    warning = too_long(max(len(window) for window in prompt_set.windows), model.config)
    if warning:
        warn(f"prompts {prompt_set.name}: {warning}")
    return replace(prompt_set, warning=warning)


def digest(windows: list[torch.Tensor]) -> str:
    """Of the tokens, in order."""
    found = hashlib.sha256()
    for window in windows:
        found.update(f"/{len(window)}/".encode() + window.numpy().tobytes())
    return found.hexdigest()


def longest_first(sets: list[PromptSet]) -> list[torch.Tensor]:
    """The windows of all sets; those of equal length stand together, so that blocks of them run together."""
    return sorted((window for prompt_set in sets for window in prompt_set.windows), key=len, reverse=True)


def used(sets: list[PromptSet]) -> list[Used]:
    """What the report says of them."""
    return [_used(prompt_set) for prompt_set in sets]


def _used(prompt_set: PromptSet) -> Used:
    found = Used(name=prompt_set.name, windows=len(prompt_set.windows), tokens=prompt_set.tokens)
    if prompt_set.warning:
        found["warning"] = prompt_set.warning
    return found


def file_of(name: str, folder: Path | None) -> Path | None:
    """The file that a set of text is read from, resolved; None for sets that are generated."""
    if name in SHIPPED:
        return passages.shipped_file(name).resolve()
    return None if name in NAMES else _find_file(name, folder, "check").resolve()


def _find_file(name: str, folder: Path | None, purpose: str) -> Path:
    usable = set(NAMES) - {"heldout" if purpose == "calibration" else "prose"}
    found = passages.find(name, folder)
    if found is None:
        raise InputError(f"prompts '{name}' is neither a file nor a known set{nearest(name, usable)}")
    if found.suffix not in (".txt", ".jsonl"):
        raise InputError(f"prompts '{name}': expected a .txt or .jsonl file")
    return found
