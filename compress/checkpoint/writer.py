"""Writes a checkpoint one unit at a time, each into its own safetensors shard, published by renaming.

A matrix is loaded, packed and written in blocks of rows: every tensor's place in the file is known beforehand from its
format and shape, so peak memory follows the block, not the tensor.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from compress import parallel
from compress.checkpoint import companions
from compress.checkpoint.companions import companion_files
from compress.checkpoint.folder import INDEX
from compress.checkpoint.safetensors_file import DTYPE_NAMES, SafetensorsFile
from compress.checkpoint.stored import reread
from compress.disk import files
from compress.disk.json_files import write_json
from compress.errors import WorkError
from compress.formats.base import Layout, Quantized
from compress.model.weight import Stored, Unit, Weight, is_finite
from compress.strict import json_text
from compress.strict.json_text import JsonObject
from compress.terminal import progress


def shard_name(number: int, total: int) -> str:
    return f"model-{number + 1:05d}-of-{total:05d}.safetensors"


class ShardWriter:
    """One unit's file under construction, beside its final name. Weights may come in any order, and be read back."""

    def __init__(self, unit: Unit, path: Path):
        self._path, self._partial = path, path.with_suffix(".tmp")
        self._reader: SafetensorsFile | None = None
        self._layout = {name: part for weight in unit.weights.values() for name, part in weight.layout().items()}
        header, self._offsets = _header(self._layout)
        self._file = open(self._partial, "wb")  # noqa: SIM115 - closed by publish
        with files.writing(path):
            self._file.write(header)
            self._file.truncate(len(header) + sum(part.bytes for part in self._layout.values()))
            self._file.flush()

    def write(self, weight: Weight, advance: Callable[[int], None] = lambda parameters: None) -> None:
        """Loads, checks and writes a weight in blocks of rows; `advance` hears of every block."""

        def write(rows: slice) -> None:
            self._write_rows(weight, rows)
            advance(math.prod(weight.shape[1:]) * (rows.stop - rows.start))

        first, *others = weight.row_blocks()
        write(first)  # alone: what it finds out for all rows, such as scales, is found by all threads
        parallel.each(write, others)

    def _write_rows(self, weight: Weight, rows: slice) -> None:
        stored = weight.load(rows)
        check_stored(weight, stored)
        for name, tensor in weight.stored_parts(stored).items():
            self._refuse_other_form(name, tensor)
            first = self._layout[name].rows(rows) or slice(0, 0)
            row_bytes = tensor.numel() * tensor.element_size() // max(1, tensor.shape[0])
            with files.writing(self._path):
                _write_at(self._file.fileno(), tensor, self._offsets[name] + first.start * row_bytes)

    def write_all(self, unit: Unit, advance: Callable[[int], None] = lambda parameters: None) -> None:
        for weight in unit.weights.values():
            self.write(weight, advance)

    def _refuse_other_form(self, name: str, tensor: torch.Tensor) -> None:
        """What does not have the planned type and width would be written over its neighbours."""
        part = self._layout.get(name)
        if part is None or tensor.dtype != part.dtype or tensor.shape[1:] != part.shape[1:]:
            raise WorkError(f"tensor '{name}': a pass gives {tensor.dtype} {list(tensor.shape)}, which was not planned")

    def written(self, weight: Weight) -> Weight:
        """The same weight, reading what was written of it."""
        self._reader = self._reader or SafetensorsFile(self._partial)
        return reread(weight, self._reader.read)

    def publish(self) -> None:
        """Flushes to disk and renames."""
        with files.writing(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            files.rename(self._partial, self._path)


def write_shard(unit: Unit, path: Path, advance: Callable[[int], None] = lambda parameters: None) -> None:
    """Writes one whole unit and publishes it."""
    shard = ShardWriter(unit, path)
    shard.write_all(unit, advance)
    shard.publish()


def _header(layout: Layout) -> tuple[bytes, dict[str, int]]:
    """The safetensors prefix and header, and every tensor's absolute offset. Wide types come first: all stay aligned."""
    entries: JsonObject = {"__metadata__": {"format": "pt"}}
    begins, position = {}, 0
    for name, part in sorted(layout.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        begins[name], end = position, position + part.bytes
        entries[name] = {"dtype": DTYPE_NAMES[part.dtype], "shape": list(part.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + begin for name, begin in begins.items()}


def _write_at(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    view = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
    while view:
        count = os.pwrite(descriptor, view[: 1 << 30], offset)
        view, offset = view[count:], offset + count


def check_stored(weight: Weight, stored: Stored) -> None:
    """What every pass guarantees: what is stored is finite, and no scale is zero or negative."""
    scales = stored.scales if isinstance(stored, Quantized) else stored
    if not is_finite(scales):
        raise WorkError(f"tensor '{weight.name}': a pass produced values that are not finite")
    if isinstance(stored, Quantized) and not bool((scales > 0).all()):
        raise WorkError(f"tensor '{weight.name}': a pass produced a scale that is not positive")


def write_index(folder: Path, units: tuple[Unit, ...]) -> None:
    total = len(units)
    weight_map = {
        name: shard_name(number, total)
        for number, unit in enumerate(units)
        for weight in unit.weights.values()
        for name in weight.layout()
    }
    size = sum(unit.stored_bytes() for unit in units)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def write_config(folder: Path, config: JsonObject) -> None:
    """config.json. What a model's own had is written as it came."""
    files.write_text(folder / "config.json", json_text.dumps_as_it_came(config) + "\n")


def copy_companions(source: Path, target: Path) -> None:
    """What travels along with the weights of the folder `source`; a warning names what does not."""
    for sentence in companions.left_behind(source):
        progress.warn(sentence)
    for path in companion_files(source):
        companions.copy(path, target)
