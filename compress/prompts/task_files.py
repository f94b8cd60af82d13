"""Tasks: multiple choice and cloze from a .jsonl file, to windows of tokens and where in them the answers begin.

A line is {"question": "...", "choices": ["...", ...], "answer": 1} or {"context": "...", "answer": "..."}. Between the two
parts of a text stands a space, where neither brings white space of its own.

How a text is cut into tokens may depend on what follows it, so a context and its continuation are tokenized as one text. The
continuation begins at the first token that the context alone would not have had; for all choices of a question at the same
token, so that their probabilities are of texts after the same beginning.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from compress.disk.paths import as_text
from compress.errors import InputError
from compress.model.config import Config
from compress.prompts import passages
from compress.prompts.text import refuse_surrogates
from compress.prompts.windows import encode, refuse_foreign_tokens, too_long
from compress.recipe.source import load_tokenizer
from compress.recipe.tokenizer import Tokenizer
from compress.strict.json_text import Json

Kind = Literal["multiple_choice", "cloze"]
EXPECTED = 'expected {"question": "...", "choices": ["...", "..."], "answer": 0} or {"context": "...", "answer": "..."}'


@dataclass(frozen=True)
class Option:
    """Token ids [T] of a context and one continuation of it, whose first token is `first`."""

    ids: torch.Tensor
    first: int


@dataclass(frozen=True)
class Item:
    """One line: what may follow, and which of it is right (of a cloze there is one)."""

    kind: Kind
    options: tuple[Option, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    name: str
    items: tuple[Item, ...]

    @property
    def options(self) -> list[Option]:
        """Of all items, in order."""
        return [option for item in self.items for option in item.options]

    @property
    def tokens(self) -> int:
        return sum(len(option.ids) for option in self.options)

    def digest(self) -> str:
        """Of everything that decides how it is answered."""
        found = hashlib.sha256()
        for item in self.items:
            found.update(f"/{item.kind}/{item.answer}/".encode())
            for option in item.options:
                found.update(f"/{option.first}/{len(option.ids)}/".encode() + option.ids.numpy().tobytes())
        return found.hexdigest()


def load_all(
    names: Sequence[str], model_folder: Path, config: Config, folder: Path | None = None
) -> tuple[list[Task], list[str]]:
    """The tasks of these files for a model, and warnings of texts that are too long for it."""
    tokenizer = load_tokenizer(model_folder) if names else None
    tasks = [load(name, tokenizer, folder) for name in names if tokenizer is not None]
    for task in tasks:
        refuse_foreign_tokens(max(int(option.ids.max()) for option in task.options), config.vocab_size)
    longest = {task.name: too_long(max(len(option.ids) for option in task.options), config) for task in tasks}
    return tasks, [f"tasks {name}: {warning}" for name, warning in longest.items() if warning]


def find(name: str, folder: Path | None) -> Path:
    """Beside the recipe, which is in `folder`, or in the working folder."""
    path = passages.find(name, folder)
    if path is None or path.suffix != ".jsonl":
        raise InputError(f"tasks '{name}': {'no such file' if path is None else 'expected a .jsonl file'}")
    return path


def load(name: str, tokenizer: Tokenizer, folder: Path | None = None) -> Task:
    """Raises InputError naming the file, and the line of what is no item."""
    path = find(name, folder)
    items = tuple(_item(value, where, tokenizer) for where, value in passages.json_lines(path).items())
    if not items:
        raise InputError(f"{path}: holds no items; a line is one, {EXPECTED}")
    return Task(as_text(name), items)


def _item(value: Json, where: str, tokenizer: Tokenizer) -> Item:
    if isinstance(value, dict) and "choices" in value:
        question, choices = _text(value.get("question"), "question", where), _choices(value["choices"], where)
        options = _options(tokenizer, question, choices, where)
        return Item("multiple_choice", options, _answer(value.get("answer"), choices, where))
    if isinstance(value, dict) and "context" in value:
        context, answer = (_text(value.get(key), key, where) for key in ("context", "answer"))
        return Item("cloze", _options(tokenizer, context, [answer], where), 0)
    raise InputError(f"{where}: {EXPECTED}")


def _text(value: Json, key: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: '{key}' is {_shown(value)}, which is no text; {EXPECTED}")
    refuse_surrogates(value, where)
    return value


def _choices(value: Json, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f"{where}: 'choices' is {_shown(value)}, which is no list of two texts or more; {EXPECTED}")
    return [_text(choice, f"choices[{place}]", where) for place, choice in enumerate(value)]


def _answer(value: Json, choices: Sequence[str], where: str) -> int:
    """The right choice's place: as it is given, or of the text that is."""
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise InputError(
        f"{where}: 'answer' is {_shown(value)}; expected the number of the right choice, 0 to {len(choices) - 1}, or its text"
    )


def _shown(value: Json) -> str:
    return "missing or null" if value is None else f"{value!r:.60}"


def _options(tokenizer: Tokenizer, context: str, continuations: Sequence[str], where: str) -> tuple[Option, ...]:
    before = encode(tokenizer, context)
    whole = [encode(tokenizer, _joined(context, continuation)) for continuation in continuations]
    first = min(_alike(before, ids) for ids in whole)
    if first == 0:
        raise InputError(f"{where}: no token stands before the continuation; write a longer context")
    for place, ids in enumerate(whole):
        if _alike(before, ids) == len(ids):
            raise InputError(f"{where}: {continuations[place]!r:.60} is no token to this tokenizer")
        if ids in whole[:place]:
            raise InputError(f"{where}: choices {whole.index(ids)} and {place} are the same; expected different ones")
    return tuple(Option(torch.tensor(ids), first) for ids in whole)


def _joined(context: str, continuation: str) -> str:
    gap = "" if context[-1].isspace() or continuation[0].isspace() else " "
    return context + gap + continuation


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
