"""Folders with the reference model's tokenizer, changed as real models differ from it."""

import json
import shutil
from pathlib import Path

FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
         "chat_template.jinja")  # fmt: skip


def changed_copy(tiny: Path, folder: Path, *, weights: bool = False, template: str | None = None, **changes) -> Path:
    """`changes`: name of a JSON file without its ending -> keys to set in it. `template` is the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, *(["model.safetensors"] if weights else [])):
        shutil.copyfile(tiny / name, folder / name)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder
