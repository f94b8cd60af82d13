"""Reads passages: the shipped ones, or a user's .txt (one passage) or .jsonl (one a line)."""

import json
from pathlib import Path

from compress import resources
from compress.errors import InputError


def shipped_file(name: str) -> Path:
    return resources.folder("calibration_data") / f"{name}.jsonl"


def shipped(name: str) -> list[str]:
    text = shipped_file(name).read_text(encoding="utf-8")
    return [json.loads(line)["text"] for line in text.split("\n") if line]


def from_file(path: Path, tokenizer) -> list[str]:
    """`.txt` is one passage; a line of `.jsonl` is {"text": ...} or {"messages": [...]} (through the chat template)."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    if path.suffix == ".txt":
        texts = [content]
    else:
        lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
        texts = [_passage(line, f"{path}:{i}", tokenizer) for i, line in lines]
    if not any(text.strip() for text in texts):
        raise InputError(f"{path}: holds no text")
    return texts


def _passage(line: str, where: str, tokenizer) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: not a JSON object") from None
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return value["text"]
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        return _chat(value["messages"], where, tokenizer)
    raise InputError(f'{where}: expected {{"text": "..."}} or {{"messages": [...]}}')


def _chat(messages: list, where: str, tokenizer) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{where}: has messages, but the model's tokenizer has no chat template")
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: the chat template refuses these messages ({error})") from None
