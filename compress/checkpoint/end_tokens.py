"""The tokens that end a text. Chat models name more of them in generation_config.json than in config.json."""

from pathlib import Path
from typing import Protocol

from compress.disk.json_files import read_json
from compress.errors import InputError
from compress.model.config import Config
from compress.strict.json_text import Json

GENERATION_CONFIG = "generation_config.json"
KEY = "eos_token_id"


class Ending(Protocol):
    """Of a tokenizer, what is asked here."""

    eos_token_id: int | None


def end_tokens(config: Config, folder: Path, tokenizer: Ending | None = None) -> list[int]:
    """Ids, each once: of the validated configuration, of the folder's generation config, of the tokenizer where one is given.

    Those that are not in the model's vocabulary are left out: it cannot give them, and no runtime accepts them.
    Raises InputError for a generation config that cannot be read.
    """
    given = _listed(config.eos_token_id) + of_generation_config(folder)
    if tokenizer is not None:
        given += _listed(tokenizer.eos_token_id)
    return list(dict.fromkeys(token for token in given if 0 <= token < config.vocab_size))


def of_generation_config(folder: Path) -> list[int]:
    """Those the folder's generation config names, if it has one."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return []
    named = read_json(path).get(KEY)
    tokens: list[Json] = named if isinstance(named, list) else [] if named is None else [named]
    return [_checked(token, path) for token in tokens]


def _checked(token: Json, path: Path) -> int:
    if type(token) is not int:
        raise InputError(f"{path}: {KEY} must be a token id or a list of them (it holds {token!r:.80})")
    return token


def _listed(tokens: int | list[int] | None) -> list[int]:
    if tokens is None:
        return []
    return tokens if isinstance(tokens, list) else [tokens]
