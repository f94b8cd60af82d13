"""The weight files of a checkpoint folder: which tensor lies in which file, and refusals of what must not be read."""

import hashlib
from collections.abc import Callable, Iterable, KeysView, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from compress.checkpoint.safetensors_file import Entry, SafetensorsFile
from compress.disk.files import file_sha256
from compress.disk.json_files import read_json
from compress.errors import InputError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


NamesOfStored = Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, tuple[str, ...]]]


class WeightFolder:
    """All tensors of a checkpoint folder by name, over one `model.safetensors` or a sharded index. `names_of_stored` says
    what they are called where that is not what files call them (`Architecture.names_of_stored`)."""

    def __init__(self, folder: Path, names_of_stored: NamesOfStored | None = None):
        self.folder = folder
        self.paths = _weight_files(folder)
        files = [SafetensorsFile(path) for path in self.paths]
        self._files = _by_name(files)
        _check_index(folder, self._files)
        if names_of_stored is not None:
            _rename(folder, self._files, names_of_stored)
            self._files = _by_name(files)

    @property
    def names(self) -> KeysView[str]:
        """A set that is not made anew: it is asked once a tensor, of which there may be 50,000."""
        return self._files.keys()

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def entry(self, name: str) -> Entry:
        return self._files[name].entries[name]

    def path_of(self, name: str) -> Path:
        return self._files[name].path

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        return self._files[name].read(name, rows)

    def sha256(self, advance: Callable[[int], None] = lambda read: None) -> str:
        """Digest of the weights: the file's own where there is one, else of the `sha256sum` listing of all shards."""
        digests = []
        for path in self.paths:
            digests.append((path.name, file_sha256(path)))
            advance(path.stat().st_size)
        if len(digests) == 1:
            return digests[0][1]
        listing = "".join(f"{digest}  {name}\n" for name, digest in digests)
        return hashlib.sha256(listing.encode()).hexdigest()


def _by_name(files: Iterable[SafetensorsFile]) -> dict[str, SafetensorsFile]:
    found: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.entries:
            if name in found:
                raise InputError(f"{file.path}: tensor '{name}' is also in {found[name].path.name}")
            found[name] = file
    return found


def _rename(folder: Path, files: Mapping[str, SafetensorsFile], names_of_stored: NamesOfStored) -> None:
    """Entries under the names that are used here; their own says what the file calls them. Of a stack, each matrix has one."""
    try:
        found = names_of_stored({name: file.entries[name].shape for name, file in files.items()})
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from None
    for stored, names in found.items():
        if names == (stored,):
            continue
        entries, entry = files[stored].entries, files[stored].entries.pop(stored)
        length, shape = entry.length // max(1, len(names)), entry.shape if len(names) == 1 else entry.shape[1:]
        for number, name in enumerate(names):
            if name in entries:
                raise InputError(f"{files[stored].path}: tensor '{stored}' is also there as '{entries[name].name}'")
            entries[name] = replace(entry, shape=shape, offset=entry.offset + number * length, length=length)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = _index_files(folder)
        if names != [SINGLE] and (folder / SINGLE).is_file():
            raise InputError(
                f"{folder}: holds {SINGLE}, and {INDEX} names other files ({names[0]}, ...); "
                "which of the two is the model? Remove the other one"
            )
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder / pickles[0]}: pickle files are never opened (they can run code); convert to safetensors first"
        )
    raise InputError(f"{folder}: no {SINGLE} and no {INDEX} in this folder")


def _index_files(folder: Path) -> list[str]:
    """File names of a sharded index, each a plain name inside the folder that exists."""
    inside = {path.name for path in folder.iterdir() if path.is_file()}
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if name not in inside:
            raise InputError(f"{folder / INDEX}: the file '{name}' it names is missing")
    return names


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of every tensor, as an index names them."""
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{folder / INDEX}: 'weight_map' must map tensor names to files")
    found: dict[str, str] = {}
    for tensor, name in listed.items():
        if not isinstance(name, str) or name != Path(name).name or not name.endswith(".safetensors"):
            raise InputError(f"{folder / INDEX}: '{name!s:.200}' is not a safetensors file inside the folder")
        found[tensor] = name
    return found


def _check_index(folder: Path, files: dict[str, SafetensorsFile]) -> None:
    """An index must list exactly the tensors its files hold, each in the file it says."""
    if not (folder / INDEX).is_file():
        return
    weight_map = _weight_map(folder)
    for name, file_name in weight_map.items():
        if name not in files or files[name].path.name != file_name:
            raise InputError(f"{folder / INDEX}: tensor '{name}' is not in the file '{file_name}' as the index says")
    unlisted = sorted(set(files) - set(weight_map))
    if unlisted:
        raise InputError(f"{files[unlisted[0]].path}: tensor '{unlisted[0]}' is not listed in {INDEX}")
