"""A baseline that is an artifact of its own, such as the last release: how it stands when it decodes itself.

Where the original is exact one pass serves both phases; rounded states and the kernels of a runtime are not.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from compress import formats, prompts
from compress.check import carried, standing, states
from compress.check.baseline import Baseline
from compress.check.compare import scored
from compress.check.standing import OnText, Place
from compress.disk import cache
from compress.prompts import PromptSet
from compress.runtime.artifacts import Artifact

NAME = "baseline"
VERSION = 1  # part of the key: raise it when our forward changes its values


def is_artifact(original: Artifact) -> bool:
    """Whether it is no original: exported, or something was done to it."""
    plain = original.formats.keys() <= {*formats.PLAIN} and not original.config.compress.passes
    return original.runtime == "onnxruntime" or not plain


def decoded(
    original: Artifact, model_sha256: str, sets: Sequence[tuple[PromptSet, Baseline]], prefill: int
) -> list[OnText]:
    """Of each prompt set, token by token after a prompt of `prefill` tokens; none where prefill tells the same."""
    if original.runtime != "onnxruntime" and not states.are_watched(None, original.config):
        return []
    return [_decoded(original, model_sha256, prompt_set, log_probs, prefill) for prompt_set, log_probs in sets]


def _decoded(original: Artifact, model_sha256: str, prompt_set: PromptSet, log_probs: Baseline, prefill: int) -> OnText:
    """From the cache where it is there."""
    cache.folder("old")

    def write(file: BinaryIO) -> None:
        found = scored(NAME, original.candidate(prefill), prompt_set, log_probs, "decode")
        place = Place(None, prompt_set, "decode")
        sums = standing.alone(place, found.scores, found.answers)
        file.write(sums.model_dump_json().encode() + b"\n")

    asked = carried.asking_for(f"how it decodes the prompts '{prompt_set.name}' after {prefill} tokens")
    with asked, cache.entry(_path(model_sha256, prompt_set, prefill), write) as file:
        return OnText.model_validate_json(file.readline())


def _path(model_sha256: str, prompt_set: PromptSet, prefill: int) -> Path:
    asked = f"{VERSION}/{model_sha256}/{prefill}/{prompt_set.name}/{prompt_set.questions}"
    key = hashlib.sha256(f"{asked}/{prompts.digest(prompt_set.windows)}".encode()).hexdigest()[:32]
    return cache.location("old") / f"{key}.json"
