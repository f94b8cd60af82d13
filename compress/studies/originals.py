"""What stands for the original in `compress check`: its files, or what was carried of it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from compress import plugins
from compress.check import carried, states
from compress.check.carried import Carried, CarriedOriginal
from compress.checkpoint.reader import has_weights, model_of_config
from compress.disk import cache
from compress.disk.paths import as_text
from compress.errors import InputError
from compress.model.hybrid import HybridModel
from compress.output_folder import integrity, onnx_layouts
from compress.output_folder.manifest import versions
from compress.recipe import source
from compress.recipe.check import Check
from compress.runtime.artifacts import Artifact, find_artifact, open_artifact
from compress.studies import results
from compress.studies.check_options import Flags


class Originals:
    """Where the original comes from, and the file that is written of it."""

    def __init__(self, flags: Flags):
        self._target, path = flags["save_baseline"], flags["baseline_file"]
        if self._target is not None and path is not None:
            raise InputError("--save-baseline writes what --baseline reads; expected one of the two")
        if self._target is not None:
            results.refuse_unwritable_file("--save-baseline", str(self._target))
            if self._target.exists() and not self._target.is_file():
                raise InputError(f"--save-baseline {self._target}: expected a file")
        self._carried = None if path is None else Carried(path)

    def open(self, name: str, checks: Check, seed: int, device: str) -> Artifact:
        """The artifact that BASELINE means. Of one that was carried, the weights are read for the audit alone."""
        path = _find(name, weights=self._carried is None)
        if self._carried is not None:
            self._carried.refuse_other_settings(checks, seed)
            model = _described(path, self._carried.header.tensors)
            self._carried.refuse_other_config(model.config, path)
            if not (checks.audit and _has_weights(path)):
                return CarriedOriginal(self._carried, onnx_layouts.folder_of(path), model)
        integrity.verify(path)
        return open_artifact(path, device)

    def verify(self, name: str, original: Artifact) -> None:
        """That its files are what they were: reads everything."""
        if isinstance(original, CarriedOriginal):
            return
        integrity.verify(_find(name, weights=True), digests=True)
        if self._carried is not None and original.sha256() != self._carried.header.sha256:
            raise InputError(f"{self._carried.path}: was made of other weights than those of {name}")

    def narrowed(self, original: Artifact, candidate: Artifact, checks: Check) -> tuple[Check, list[str]]:
        """The check as far as this original allows it, and what is left out."""
        said, left_out = [], dict[str, bool]()
        if checks.audit and isinstance(original, CarriedOriginal):
            said.append("not audited: the weights of the original are not there, only what was measured of it")
            left_out["audit"] = False
        if self._has_no_states(original, candidate, checks):
            left_out["states"] = False
            said.append("states were not measured: the file of the baseline has none of the original's")
        return checks.model_copy(update=left_out), said

    def _has_no_states(self, original: Artifact, candidate: Artifact, checks: Check) -> bool:
        if self._carried is None or not isinstance(original, CarriedOriginal) or checks.states is not None:
            return False
        return states.are_watched(None, candidate.config) and not self._carried.holds("states")

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Mapping[str, BinaryIO]]:
        """Figures of the original come from the file, or are noted for one."""
        if self._carried is not None:
            with cache.carrying(self._carried):
                yield {}
        else:
            with cache.noting() as noted:
                yield noted

    def save(self, name: str, original: Artifact, checks: Check, seed: int, noted: Mapping[str, BinaryIO]) -> None:
        if self._target is not None:
            carried.save(self._target, carried.header(as_text(name), original, checks, seed, versions()), noted)


def _find(name: str, *, weights: bool) -> Path:
    """A local artifact, or a model by name."""
    return find_artifact(Path(name)) if Path(name).exists() else source.resolve(name, weights=weights).folder


def _described(path: Path, stored: Mapping[str, str]) -> HybridModel:
    """The model without its weights: what config.json, or the graph, and the formats of its tensors say."""
    if path.suffix != ".onnx":
        return model_of_config(path, stored)
    reading = plugins.graph_reading()
    return reading.hybrid(reading.load(path), path)


def _has_weights(path: Path) -> bool:
    if path.suffix != ".onnx":
        return has_weights(path)
    reading = plugins.graph_reading()
    return all(Path(tensor.path).is_file() for tensor in reading.external_tensors(reading.load(path)))
