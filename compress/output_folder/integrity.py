"""Whether files are still what manifest.json says: the digests that `apply` writes are read again here.

A manifest serves its own folder and every folder below it that it lists files of. A folder without one, such as a model
from the hub, has nothing to be compared with.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from compress.disk.files import file_sha256
from compress.disk.json_files import read_json
from compress.errors import InputError
from compress.output_folder.onnx_layouts import folder_of
from compress.strict.json_text import Json
from compress.terminal import progress

MANIFEST = "manifest.json"
RECIPE = "recipe.resolved.yaml"  # stands beside every manifest of ours; other tools have files named manifest.json too
DEPTH = 3  # folders above an artifact in which its manifest is looked for
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What one manifest.json says of the files below its folder, by relative path."""

    path: Path
    files: dict[PurePosixPath, Entry]

    def lists(self, folder: str) -> bool:
        return bool(self.below(PurePosixPath(folder)))

    def below(self, folder: PurePosixPath) -> dict[PurePosixPath, Entry]:
        """The files in one folder, by their path within it."""
        return {name.relative_to(folder): entry for name, entry in self.files.items() if name.is_relative_to(folder)}


@dataclass(frozen=True)
class Verified:
    """How much of an artifact was compared with its manifest."""

    files: int
    bytes: int


def manifest_in(folder: Path) -> Manifest | None:
    """The folder's own manifest; None where there is none of ours. Raises InputError for a damaged one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    is_output = (folder / RECIPE).is_file()
    try:
        values = read_json(path)
    except InputError:
        if is_output:
            raise
        return None
    if is_output or {"schema", "files", "tensors"} <= values.keys():
        return Manifest(path, _entries(values.get("files"), path))
    return None


def is_output(folder: Path) -> bool:
    """Whether `apply` made the folder, be it damaged since."""
    try:
        return manifest_in(folder) is not None
    except InputError:
        return True


def verify(artifact: Path, *, digests: bool = False) -> Verified | None:
    """Compares an artifact's folder with the manifest that serves it: presence and size of every file, with `digests` content.

    Raises InputError naming the file that differs; None where no manifest serves the folder.
    """
    found = _serving(artifact)
    if found is None:
        return None
    folder, manifest, entries = found
    for name, entry in entries.items():
        _compare_size(folder / name, entry, manifest.path)
    total = sum(entry.bytes for entry in entries.values())
    if digests:
        _compare_digests(folder, entries, manifest.path, total)
    return Verified(len(entries), total)


def _serving(artifact: Path) -> tuple[Path, Manifest, dict[PurePosixPath, Entry]] | None:
    """The artifact's folder, the nearest manifest that lists files in it, and those files.

    Links are followed where the path as it is given leads to no manifest.
    """
    for path in (artifact, artifact.resolve()):
        folder = folder_of(path)
        whole = folder.absolute()
        for base in (whole, *whole.parents[:DEPTH]):
            manifest = manifest_in(base)
            if manifest and (entries := manifest.below(PurePosixPath(whole.relative_to(base)))):
                return folder, manifest, entries
    return None


def _compare_size(path: Path, entry: Entry, manifest: Path) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if size is None:
        raise InputError(f"{path}: is missing, though {manifest} lists it")
    if size != entry.bytes:
        raise InputError(
            f"{path}: has {size:,} bytes, but {entry.bytes:,} by {manifest}: it was damaged or changed since it was written"
        )


def _compare_digests(folder: Path, entries: dict[PurePosixPath, Entry], manifest: Path, total: int) -> None:
    with progress.task("verifying digests", total) as advance:
        for name, entry in entries.items():
            if _sha256(folder / name) != entry.sha256:
                raise InputError(
                    f"{folder / name}: does not have the digest that {manifest} gives: "
                    "it was damaged or changed since it was written"
                )
            advance(entry.bytes)


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _entries(files: Json, path: Path) -> dict[PurePosixPath, Entry]:
    if not isinstance(files, dict):
        raise InputError(f"{path}: not a manifest of this tool (no 'files' in it)")
    return {_inside(name, path): _entry(name, values, path) for name, values in files.items()}


def _inside(name: str, path: Path) -> PurePosixPath:
    """A listed name must stay in the manifest's folder: it is opened and read."""
    listed = PurePosixPath(name)
    if listed.is_absolute() or ".." in listed.parts or not listed.parts or "\0" in name:
        raise InputError(f"{path}: '{name:.200}' in it is not a file inside the folder")
    return listed


def _entry(name: str, values: Json, path: Path) -> Entry:
    size, digest = (values.get(key) for key in ("bytes", "sha256")) if isinstance(values, dict) else (None, None)
    if type(size) is int and size >= 0 and isinstance(digest, str) and SHA256.fullmatch(digest):
        return Entry(size, digest)
    raise InputError(f"{path}: the entry of '{name:.200}' is damaged; expected its bytes and sha256")
