"""Finds the model a user names: a local folder, shipped data, or an id on the Hugging Face hub."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from compress.checkpoint import companions
from compress.disk.paths import as_text, with_text_name
from compress.errors import InputError, first_line
from compress.output_folder import integrity
from compress.recipe import resources
from compress.recipe.tokenizer import Tokenizer

# weights, configuration, tokenizer and papers; never code, never pickles, whatever their names begin with
WANTED = (
    "*.safetensors",
    "*.json",
    "*.model",
    "*.jinja",
    "*.txt",
    "README.md",
    *("LICENSE", "LICENSE.md", "LICENCE", "LICENCE.md", "NOTICE", "NOTICE.md"),
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
NO_LIMIT = 1 << 62  # tokens: tokenizers would warn of errors; of what is too long for a model we speak ourselves
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """`name` is for people: text, whatever the folder is called."""

    name: str
    folder: Path
    revision: str | None = None


def resolve(name: str, recipe_folder: Path | None = None, *, config_only: bool = False, weights: bool = True) -> Source:
    """`id@revision` pins a hub revision; raises InputError where the model cannot be had. Without `weights` they are neither
    fetched nor looked for."""
    local = resources.find_model(name, recipe_folder)
    if local is not None:
        if integrity.is_output(local) and (local / "checkpoint").is_dir():
            raise InputError(f"model '{name}': an output of apply; its model is {Path(name) / 'checkpoint'}")
        if weights and not config_only:
            integrity.verify(local)
        return Source(as_text(local.resolve().name), local)
    if not HUB_ID.fullmatch(name):
        raise InputError(f"model '{name}': no such folder, and not a hub id (OWNER/NAME or OWNER/NAME@REVISION)")
    identifier, _, revision = name.partition("@")
    return _download(identifier, revision or None, ("config.json",) if config_only else WANTED[not weights :])


def _download(identifier: str, revision: str | None, wanted: tuple[str, ...]) -> Source:
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(identifier, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # beside the hub's own errors come those of whichever HTTP library it uses
        reason = first_line(error)
        raise InputError(
            f"model '{identifier}': neither a local folder nor to be had from the hub ({reason})"
        ) from None
    return Source(identifier, folder, folder.resolve().name)  # a snapshot folder is named by its commit


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZERS)


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """The folder's tokenizer, or None where there is none that can be loaded."""
    try:
        return load_tokenizer(folder) if has_tokenizer(folder) else None
    except InputError:
        return None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer; raises InputError where there is none."""
    if not has_tokenizer(folder):
        raise InputError(f"{folder}: has no tokenizer files, and the prompts are text")
    companions.refuse_pointers(folder)
    from transformers import AutoTokenizer

    try:
        with with_text_name(folder) as named:
            loaded = AutoTokenizer.from_pretrained(named, local_files_only=True, trust_remote_code=False)
        tokenizer = cast(Tokenizer, loaded)  # each of transformers' classes has what is asked; none of them declares it
        tokenizer.model_max_length = NO_LIMIT
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise InputError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)})") from None
