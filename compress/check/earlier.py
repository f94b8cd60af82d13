"""The result of an earlier check in a file, and whether a later one is on the same ground: the same baseline, the same text and
the same tasks, decoded alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from pydantic import Field, ValidationError

from compress.check.changes import ChangeFacts, between
from compress.check.standing import Standing
from compress.disk.json_files import read_json
from compress.disk.paths import as_text as as_name
from compress.errors import InputError
from compress.recipe.check import Check
from compress.strict import json_text
from compress.strict.models import Strict, key_path, what_was_expected


class Text(Strict):
    """A prompt set or a task, and the digest of its tokens."""

    name: str
    sha256: str


class Ground(Strict):
    """What a check measured on. Where texts differ, `samples`, `length` and `seed` may tell why."""

    baseline_sha256: str
    prompts: tuple[Text, ...]
    tasks: tuple[Text, ...]
    samples: int
    length: int
    prefill: int
    seed: int


class Earlier(Strict):
    """A stored result: what was measured of `candidate`, on which ground."""

    kind: Literal["compress check"] = "compress check"
    schema_number: Literal[1] = Field(default=1, alias="schema")
    candidate: str
    ground: Ground
    standing: Standing
    versions: dict[str, str]


class AgainstFacts(TypedDict):
    """A comparison with a stored result: the file, which candidate it is of, and by which versions it was made."""

    file: str
    candidate: str
    versions: dict[str, str]
    changes: list[ChangeFacts]


@dataclass(frozen=True)
class Now:
    """What was measured just now."""

    candidate: str
    ground: Ground
    standing: Standing


def expected(baseline_sha256: str, settings: Check, seed: int) -> Ground:
    """What a check will measure on, before its texts are there."""
    prompts, tasks = (
        tuple(Text(name=as_name(name), sha256="") for name in names) for names in (settings.prompts, settings.tasks)
    )
    return Ground(
        baseline_sha256=baseline_sha256,
        prompts=prompts,
        tasks=tasks,
        samples=settings.samples,
        length=settings.length,
        prefill=settings.prefill,
        seed=seed,
    )


def measured(expected: Ground, standing: Standing) -> Ground:
    """With the digests of the texts that were measured on."""
    prompts = {one.prompts: Text(name=one.prompts, sha256=one.sha256) for one in standing.text}
    tasks = (Text(name=one.task, sha256=one.sha256) for one in standing.tasks)
    return expected.model_copy(update={"prompts": tuple(prompts.values()), "tasks": tuple(tasks)})


def read(path: Path) -> Earlier:
    """Raises InputError for what is no stored result."""
    values = read_json(path)
    if values.get("kind") != "compress check":
        raise InputError(f"{path}: expected a result that 'compress check --save-result' wrote")
    try:
        return Earlier.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {'.'.join(map(str, key_path(first)))}: {what_was_expected(first)}") from None


def as_text(now: Now, versions: dict[str, str]) -> str:
    """What `read` reads."""
    stored = Earlier(candidate=now.candidate, ground=now.ground, standing=now.standing, versions=versions)
    return json_text.dumps(stored.model_dump(mode="json", by_alias=True)) + "\n"


def against(path: Path, earlier: Earlier, now: Now) -> AgainstFacts:
    """Raises InputError naming what differs where the two cannot be compared."""
    refuse_other_settings(path, earlier, now.ground)
    _refuse_other_texts(path, earlier, now.ground)
    if _shape(earlier.standing) != _shape(now.standing):
        raise InputError(f"{path}: does not hold what its prompts and tasks give here; measure it anew")
    return {
        "file": as_name(str(path)),
        "candidate": earlier.candidate,
        "versions": earlier.versions,
        "changes": between(earlier.standing, now.standing),
    }


def refuse_other_settings(path: Path, earlier: Earlier, now: Ground) -> None:
    """What can be told before anything is measured; of `now` the texts need only have their names."""
    then = earlier.ground
    for key in ("samples", "length", "prefill", "seed"):
        if getattr(then, key) != getattr(now, key):
            raise InputError(
                f"{path}: was measured with {key} {getattr(then, key)}, this check has {getattr(now, key)}"
            )
    for key in ("prompts", "tasks"):
        names = [sorted(text.name for text in getattr(one, key)) for one in (then, now)]
        if names[0] != names[1]:
            before, after = (", ".join(found) or "none" for found in names)
            raise InputError(f"{path}: was measured on the {key} {before}, this check on {after}")
    if then.baseline_sha256 != now.baseline_sha256:
        shown = then.baseline_sha256[:12], now.baseline_sha256[:12]
        raise InputError(f"{path}: was measured against another baseline (sha256 {shown[0]}..., here {shown[1]}...)")


def _refuse_other_texts(path: Path, earlier: Earlier, now: Ground) -> None:
    for key in ("prompts", "tasks"):
        then = {text.name: text.sha256 for text in getattr(earlier.ground, key)}
        for text in getattr(now, key):
            if then[text.name] != text.sha256:
                raise InputError(f"{path}: was measured on other text of the {key} '{text.name}'")


def _shape(standing: Standing) -> object:
    """How many windows, positions, questions and items there are of what."""
    text = {(one.prompts, one.phase): (one.positions, one.asked) for one in standing.text}
    return text, {one.task: len(one.right) for one in standing.tasks}
