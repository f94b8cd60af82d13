"""genai_config.json of an ONNX artifact: whether it describes the graph beside it, since onnxruntime-genai believes it."""

from collections.abc import Sequence
from pathlib import Path

from compress.disk.json_files import read_json
from compress.errors import InputError
from compress.model.config import Config
from compress.output_folder.onnx_layouts import GENAI
from compress.strict.json_text import Json, JsonObject


def refuse_broken(model: Path, config: Config) -> None:
    """Raises InputError where the file is there and is damaged, or belongs to another model than `config` is of."""
    path = model.parent / GENAI.config
    if not path.is_file():
        return
    section = _mapping(read_json(path), "model", path)
    decoder = _mapping(section, "decoder", path)
    if decoder.get("filename") != model.name:
        raise InputError(f"{path}: 'model.decoder.filename' is {decoder.get('filename')!r:.80}, not '{model.name}'")
    _expect(section, "vocab_size", config.vocab_size, path)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        _check_ids(section, name, config, path)
    if "num_hidden_layers" in decoder:
        _expect(decoder, "num_hidden_layers", config.num_hidden_layers, path)


def _mapping(values: JsonObject, key: str, path: Path) -> JsonObject:
    found = values.get(key)
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a mapping '{key}'")
    return found


def _expect(values: JsonObject, key: str, expected: int, path: Path) -> None:
    if values.get(key) != expected:
        raise InputError(
            f"{path}: '{key}' is {values.get(key)!r:.80}, but the graph was made from a model with {expected}"
        )


def _check_ids(section: JsonObject, key: str, config: Config, path: Path) -> None:
    """Ids of the vocabulary, and all of it that the model's configuration names; an end of text may have more. What the
    configuration names beyond the vocabulary, such as a padding that was added later, is not this file's fault."""
    ids, named = _as_list(section.get(key)), _as_list(getattr(config, key))
    known = [value for value in named if isinstance(value, int) and 0 <= value < config.vocab_size]
    for value in ids:
        if type(value) is not int or not (0 <= value < config.vocab_size or value in named):
            raise InputError(f"{path}: '{key}' holds {value!r:.80}; expected ids below {config.vocab_size}")
    if not set(known) <= set(ids):
        raise InputError(
            f"{path}: '{key}' is {section.get(key)!r:.80}, but the graph was made from a model with {known}"
        )


def _as_list(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else [] if value is None else [value]
