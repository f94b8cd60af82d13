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


def shipped_file(name: str) -> Path:
    return resources.folder("calibration_data") / f"{name}.jsonl"


def shipped(name: str) -> list[str]:
    text = shipped_file(name).read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in text.split("\n") if line]


def from_file(path: Path, tokenizer: Tokenizer) -> list[str]:
    """`.txt` is one passage; a line of `.jsonl` is {"text": ...} or {"messages": [...]} (through the chat template)."""
    refuse_pointer(path)
    try:
        content = decode(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    texts = [content] if path.suffix == ".txt" else _from_lines(content, path, tokenizer)
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no text")
    return texts


def _from_lines(content: str, path: Path, tokenizer: Tokenizer) -> list[str]:
    """Lines end at a newline and at nothing else. A byte order mark stands within where files were joined."""
    lines = ((f"{path}:{i}", line.removeprefix("\ufeff")) for i, line in enumerate(content.split("\n"), 1))
    found = {where: _passage(line, where) for where, line in lines if line.strip()}
    chats = {where: value for where, value in found.items() if isinstance(value, dict)}
    texts = {where: value for where, value in found.items() if isinstance(value, str)}
    if chats:
        texts |= zip(chats, chat.render(tokenizer, chats), strict=True)
    for where in found:
        refuse_surrogates(texts[where], where)
    return [texts[where] for where in found]


def _passage(line: str, where: str) -> str | chat.Chat:
    """The text of a line, or its chat, to be rendered."""
    try:
        value = json_text.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not a JSON object ({first_line(error)})") from None
    if isinstance(value, dict) and isinstance(text := value.get("text"), str):
        return text
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return chat.arguments(value, where)
    raise InputError(f'{where}: expected {{"text": "..."}} or {{"messages": [...]}}')
