"""Reads passages: the shipped ones, or a user's .txt (one passage) or .jsonl (one a line)."""

import json
from pathlib import Path

from compress.disk.pointers import refuse_pointer
from compress.errors import InputError, first_line
from compress.prompts import chat
from compress.prompts.text import decode, refuse_surrogates
from compress.recipe import resources
from compress.recipe.tokenizer import Tokenizer
from compress.strict import json_text
from compress.strict.json_text import Json


def shipped_file(name: str) -> Path:
    return resources.folder("calibration_data") / f"{name}.jsonl"


def shipped(name: str) -> list[str]:
    text = shipped_file(name).read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in text.split("\n") if line]


def find(name: str, folder: Path | None) -> Path | None:
    """A user's file: beside the recipe, which is in `folder`, or in the working folder."""
    candidates = ([folder / name] if folder else []) + [Path(name)]
    return next((candidate for candidate in candidates if _is_file(candidate)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long to be a path
        return False


def from_file(path: Path, tokenizer: Tokenizer) -> list[str]:
    """`.txt` is one passage; a line of `.jsonl` is {"text": ...} or {"messages": [...]} (through the chat template)."""
    texts = [read(path)] if path.suffix == ".txt" else _from_lines(path, tokenizer)
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no text")
    return texts


def read(path: Path) -> str:
    """The text of a user's file."""
    refuse_pointer(path)
    try:
        return decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def json_lines(path: Path) -> dict[str, Json]:
    """What the lines of a .jsonl hold, by where that is (`FILE:LINE`). Lines end at a newline and at nothing else; empty ones
    do not count. A byte order mark stands within where files were joined."""
    lines = ((f"{path}:{i}", line.removeprefix("\ufeff")) for i, line in enumerate(read(path).split("\n"), 1))
    return {where: _json(line, where) for where, line in lines if line.strip()}


def _json(line: str, where: str) -> Json:
    try:
        return json_text.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object ({first_line(error)})") from None


def _from_lines(path: Path, tokenizer: Tokenizer) -> list[str]:
    found = {where: _passage(value, where) for where, value in json_lines(path).items()}
    chats = {where: value for where, value in found.items() if isinstance(value, dict)}
    texts = {where: value for where, value in found.items() if isinstance(value, str)}
    if chats:
        texts |= zip(chats, chat.render(tokenizer, chats), strict=True)
    for where in found:
        refuse_surrogates(texts[where], where)
    return [texts[where] for where in found]


def _passage(value: Json, where: str) -> str | chat.Chat:
    """The text of a line, or its chat, to be rendered."""
    if isinstance(value, dict) and isinstance(text := value.get("text"), str):
        return text
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return chat.arguments(value, where)
    raise InputError(f'{where}: expected {{"text": "..."}} or {{"messages": [...]}}')
