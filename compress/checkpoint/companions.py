"""What travels along with the weights: tokenizer, generation defaults, licence, model card; never code.

A link may lead to a file of the same folder or into a hub cache. Where else it leads is not ours to publish.
"""

import json
import shutil
from pathlib import Path

from compress.disk.pointers import refuse_pointer
from compress.strict import json_text
from compress.strict.json_text import JsonObject

COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
    *("LICENSE", "LICENSE.*", "LICENCE", "LICENCE.*", "NOTICE", "NOTICE.*"),
)
CARD = "README.md"
CODE = ("auto_map", "custom_pipelines")  # keys of JSON files that name code in the folder, which is not copied


def companion_files(folder: Path) -> list[Path]:
    """The tokenizer, generation config, chat template and licence files of a checkpoint folder."""
    found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if may_travel(path))


def left_behind(folder: Path) -> list[str]:
    """A sentence on each companion, the model card among them, that does not travel since it is a link out of the folder."""
    found = {path for pattern in (*COPIED, CARD) for path in folder.glob(pattern) if path.is_file()}
    return [
        f"{path.name!r} is a link out of the model's folder: what it leads to is not published."
        for path in sorted(found)
        if not may_travel(path)
    ]


def refuse_pointers(folder: Path) -> None:
    for path in companion_files(folder):
        refuse_pointer(path)


def copy(path: Path, folder: Path) -> None:
    """Copies a companion into `folder`, without the keys that name code."""
    target = folder / path.name
    values = _object(path) if path.suffix == ".json" else {}
    if values.keys() & set(CODE):
        target.write_text(json_text.dumps_as_it_came(without_code(values)) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(path, target)


def _object(path: Path) -> JsonObject:
    """What a JSON file maps; nothing where it is none, as what cannot be read names no code."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def without_code(values: JsonObject) -> JsonObject:
    """A configuration without what names code."""
    return {key: value for key, value in values.items() if key not in CODE}


def may_travel(path: Path) -> bool:
    """Whether a file of a checkpoint folder lies in it, or in the hub cache that the folder or the link belongs to."""
    real = path.resolve()
    return any(real.is_relative_to(root) for root in _roots(path.parent.resolve())) or _in_hub_repository(real)


def _roots(folder: Path) -> list[Path]:
    """The folder; and of a hub snapshot (CACHE/REPOSITORY/snapshots/COMMIT) the files that snapshots are links to."""
    roots = [folder]
    for place in folder.parents:
        if place.name == "snapshots":
            repository = place.parent
            roots += [repository / "blobs", repository.parent / "blobs"]  # the second: shared among repositories
    return roots


def _in_hub_repository(real: Path) -> bool:
    """`CACHE/models--OWNER--NAME/blobs/DIGEST`."""
    return real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
