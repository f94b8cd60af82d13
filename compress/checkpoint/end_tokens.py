"""The tokens that end a text. Chat models name more of them in generation_config.json than in config.json."""

from pathlib import Path

from compress.disk.json_files import read_json
from compress.errors import InputError

GENERATION_CONFIG = "generation_config.json"
KEY = "eos_token_id"


def end_tokens(config, folder: Path, tokenizer=None) -> list[int]:
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
    tokens = _listed(read_json(path).get(KEY))
    for token in tokens:
        if type(token) is not int:
            raise InputError(f"{path}: {KEY} must be a token id or a list of them (it holds {token!r:.80})")
    return tokens


def _listed(value) -> list:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
