"""What a check needs of an original, in one file: its log-probabilities, and whatever else was measured of it.

The file is a tar archive of a header and of entries of the cache as they are, each with its digest. Whoever has it needs of the
original only config.json and the tokenizer.
"""

import contextlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

import torch
from pydantic import Field, ValidationError

from compress.disk import cache, files, partials
from compress.disk.part import part
from compress.disk.paths import as_text
from compress.errors import InputError
from compress.model import sizes
from compress.model.config import Config
from compress.model.hybrid import HybridModel
from compress.recipe.check import Check, Generate, Recall
from compress.runtime.artifacts import Artifact, Steps
from compress.runtime.inference import Advance, Cuts
from compress.runtime.kept import Listen
from compress.runtime.pieces import Piece
from compress.strict import json_text
from compress.strict.models import Strict, key_path, what_was_expected
from compress.terminal import progress

HEADER = "baseline.json"
MOST_HEADER_BYTES = 16 << 20


class Header(Strict):
    """Which model, with the format of each of its tensors, on what, in which settings, and what else is in the file."""

    kind: Literal["compress baseline"] = "compress baseline"
    schema_number: Literal[1] = Field(default=1, alias="schema")
    model: str
    sha256: str
    config: dict[str, str]
    tensors: dict[str, str]
    weight_bytes: int
    runtime: str
    bodies: dict[str, int] = Field(default_factory=dict)
    prompts: tuple[str, ...]
    tasks: tuple[str, ...]
    samples: int
    length: int
    seed: int
    recall: Recall | None
    generate: Generate | None
    entries: tuple[str, ...] = ()
    versions: dict[str, str]


def header(name: str, original: Artifact, settings: Check, seed: int, versions: dict[str, str]) -> Header:
    return Header(
        model=name,
        sha256=original.sha256(),
        config=_described(original.config),
        tensors={weight.name: weight.format for weight in original.model().weights},
        weight_bytes=original.weight_bytes,
        runtime=original.runtime,
        bodies=dict(original.bodies),
        prompts=tuple(map(as_text, settings.prompts)),
        tasks=tuple(map(as_text, settings.tasks)),
        samples=settings.samples,
        length=settings.length,
        seed=seed,
        recall=settings.recall,
        generate=settings.generate,
        versions=versions,
    )


def save(path: Path, described: Header, entries: Mapping[str, BinaryIO]) -> None:
    """Appears whole or not at all; of a symbolic link the target does."""
    path = path.resolve()
    sizes = {name: file.seek(0, io.SEEK_END) for name, file in entries.items()}
    described = described.model_copy(update={"entries": tuple(entries)})
    text = json_text.dumps(described.model_dump(mode="json", by_alias=True)).encode()
    with (
        files.writing(path),
        partials.beside(path) as room,
        progress.task(f"writing {path.name}", sum(sizes.values())) as advance,
    ):
        with tarfile.open(room / path.name, "w") as archive:
            _add(archive, HEADER, io.BytesIO(text), len(text))
            for name, file in entries.items():
                _add(archive, name, file, sizes[name])
                advance(sizes[name])
        files.sync(room / path.name)
        files.rename(room / path.name, path)


def _add(archive: tarfile.TarFile, name: str, file: BinaryIO, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    file.seek(0)
    archive.addfile(member, file)


class Carried:
    """An opened file. Raises InputError for what is none, or is not whole."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with tarfile.open(path, "r:") as archive:
                self._members = {member.name: member for member in archive.getmembers() if member.isfile()}
            self._file = open(path, "rb")  # noqa: SIM115 - stays open
        except (tarfile.TarError, EOFError):
            raise InputError(f"{path}: not a file that 'compress check --save-baseline' wrote, or cut short") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        is_header = self.has(HEADER) and self._members[HEADER].size <= MOST_HEADER_BYTES
        self.header = self._header(self._opened(HEADER).read() if is_header else b"")
        if missing := [name for name in self.header.entries if not self.has(name)]:
            raise InputError(f"{path}: was cut short: '{missing[0]}' is not in it")

    def _header(self, text: bytes) -> Header:
        try:
            return Header.model_validate(json_text.loads(text))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, key_path(first)))
            raise InputError(f"{self.path}: {HEADER}: {key}: {what_was_expected(first)}") from None
        except (ValueError, RecursionError):
            raise InputError(f"{self.path}: not a file that 'compress check --save-baseline' wrote") from None

    def _opened(self, name: str) -> io.BufferedReader:
        return part(self._file, self._members[name].offset_data, self._members[name].size)

    def has(self, name: str) -> bool:
        return name in self._members

    def entry(self, name: str) -> io.BufferedReader:
        """An entry of the cache by `KIND/NAME`."""
        file = self._opened(name)
        if not cache.agrees(file, name.rpartition("/")[2], self._members[name].size):
            raise InputError(f"{self.path}: '{name}' does not agree with its digest; copy the file anew")
        return file

    def holds(self, kind: str) -> bool:
        """Whether anything of a kind is in it."""
        return any(name.startswith(f"{kind}/") for name in self._members)

    def refuse_other_settings(self, settings: Check, seed: int) -> None:
        """What can be told before any text is there; fewer prompts and tasks may be asked for."""
        then = self.header
        for key, now in (("samples", settings.samples), ("length", settings.length), ("seed", seed)):
            if getattr(then, key) != now:
                raise InputError(f"{self.path}: was made with {key} {getattr(then, key)}, this check has {now}")
        for key in ("prompts", "tasks"):
            for name in map(as_text, getattr(settings, key)):
                if name not in getattr(then, key):
                    held = ", ".join(getattr(then, key)) or "none"
                    raise InputError(f"{self.path}: holds nothing of the {key} '{name}'; its {key}: {held}")
        if "recall" in settings.prompts and then.recall != settings.recall:
            raise InputError(f"{self.path}: was made with other 'recall' questions ({_shown(then.recall)})")
        if settings.generate is not None and then.generate != settings.generate:
            raise InputError(f"{self.path}: was made with other generated texts ({_shown(then.generate)})")

    def refuse_other_config(self, config: Config, where: Path) -> None:
        """The folder beside the file is of the same model."""
        then, here = self.header.config, _described(config)
        for key in sorted(here.keys() | then.keys()):
            if here.get(key) != then.get(key):
                values = f"{then.get(key)!s:.80}, not {here.get(key)!s:.80}"
                raise InputError(f"{self.path}: was made of another model than {where}: its {key} is {values}")


def _described(config: Config) -> dict[str, str]:
    """Every key of a model's configuration, infinite values too."""
    return {key: repr(getattr(config, key)) for key in type(config).model_fields}


def _shown(options: Strict | None) -> str:
    return "none" if options is None else " ".join(json_text.dumps(options.in_force()).split())


class NotCarriedError(InputError):
    """A figure of the original was asked for that is not in the file."""


@contextlib.contextmanager
def asking_for(what: str) -> Iterator[None]:
    """Names what was asked for where it is not in the file."""
    try:
        yield
    except NotCarriedError as error:
        raise InputError(f"{error} ({what}); make it anew with --save-baseline") from None


class CarriedOriginal:
    """An original without its weights: an Artifact whose figures are those of the file, and that computes nothing."""

    def __init__(self, carried: Carried, folder: Path, model: HybridModel):
        self._carried, self.folder, self._model, self.config = carried, folder, model, model.config
        self.formats = sizes.parameters_by_format(model.weights)
        self.weight_bytes, self.runtime = carried.header.weight_bytes, carried.header.runtime
        self.bodies: Mapping[str, int] = carried.header.bodies

    def sha256(self) -> str:
        return self._carried.header.sha256

    def candidate(self, prefill: int = 0) -> "NoFigures":
        return NoFigures(self._carried.path, self.config.vocab_size)

    def model(self) -> HybridModel:
        """Whose weights cannot be read."""
        return self._model

    def steps(self, batch: int) -> Steps:
        _refuse(self._carried.path)

    def bytes_read_per_step(self) -> int:
        """As of a model that takes long to step: what is only shown does without."""
        return self.weight_bytes


class NoFigures:
    """Whoever asks it was not served by the file."""

    def __init__(self, path: Path, vocab_size: int):
        self._path, self.vocab_size = path, vocab_size

    def steps(self, tokens: int) -> int:
        return tokens

    def logits(
        self, windows: list[torch.Tensor], phase: str, advance: Advance, listen: Listen | None = None
    ) -> Iterator[Piece]:
        _refuse(self._path)

    def remember(self, windows: list[torch.Tensor], cuts: Cuts, advance: Advance, listen: Listen) -> None:
        _refuse(self._path)


def _refuse(path: Path) -> NoReturn:
    raise NotCarriedError(f"{path}: does not hold what is asked of the original")
