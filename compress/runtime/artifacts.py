"""What an ARTIFACT argument means, and what can be done with one: score windows of tokens, or go on token by token.

It is an output folder of `apply`, one of its subfolders, a checkpoint folder, or a model.onnx.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from compress import plugins
from compress.checkpoint.reader import Checkpoint
from compress.disk.files import file_sha256
from compress.errors import InputError
from compress.model import sizes
from compress.model.config import Config
from compress.model.hybrid import HybridModel
from compress.output_folder import integrity, onnx_layouts
from compress.runtime import twin
from compress.runtime.candidates import CheckpointCandidate, OnnxCandidate, StatefulCandidate
from compress.runtime.inference import Decoder, fits_in_memory
from compress.runtime.onnx_session import OnnxDecoder, OnnxSession

PREFERRED = ("onnxruntime", "onnx", "tensorrt", "checkpoint")  # of an output folder: the first that is there


def find_artifact(path: Path) -> Path:
    """The model.onnx, or the checkpoint folder, that `path` means."""
    if path.is_file():
        if path.suffix != ".onnx":
            raise InputError(f"{path}: expected a folder or a model.onnx")
        return path
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    if manifest := integrity.manifest_in(path):
        path = next((path / name for name in PREFERRED if manifest.lists(name) or (path / name).is_dir()), path)
        if not path.is_dir():
            raise InputError(f"{path}: is missing, though {manifest.path} lists it; name another part of the output")
    if graph := onnx_layouts.find(path):
        return graph
    if (path / "config.json").is_file():
        return path
    raise InputError(f"{path}: neither an output of apply, nor a checkpoint folder, nor a folder with a model.onnx")


class Steps(Protocol):
    """Generation in progress: `step(ids [B, S])` returns the last logits [B, V] and keeps the states."""

    def step(self, ids: torch.Tensor) -> torch.Tensor: ...


class Artifact(Protocol):
    """A model that runs. `folder` has its tokenizer, `config` its validated configuration, `formats` says how many
    parameters each number format stores, in `weight_bytes`, `runtime` what computes it. `bodies`: how many blocks end in which
    number format of hidden states, of a graph that says so, and that is run as it is written."""

    folder: Path
    config: Config
    formats: dict[str, int]
    weight_bytes: int
    runtime: str
    bodies: Mapping[str, int]

    def sha256(self) -> str:
        """Digest of everything that decides its logits."""

    def model(self) -> HybridModel:
        """Its weights as they are stored, read when they are asked for."""

    def candidate(self, prefill: int = 0) -> StatefulCandidate:
        """What scores windows; it decodes after a prompt of so many tokens."""

    def steps(self, batch: int) -> Steps: ...

    def bytes_read_per_step(self) -> int:
        """Of weights, which every step of `steps` reads again; 0 where they stay in memory."""


class CheckpointArtifact:
    """An opened checkpoint through our own forward; the digest of its weights may be given where it is known already."""

    runtime = "torch"

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", weights_sha256: str | None = None):
        self.folder, self.config = checkpoint.folder, checkpoint.model.config
        self._checkpoint, self._model, self._device = checkpoint, checkpoint.model, device
        self._weights_sha256 = weights_sha256
        self.formats = sizes.parameters_by_format(checkpoint.model.weights)
        self.weight_bytes = sizes.stored_bytes(checkpoint.model.units)
        self.bodies: Mapping[str, int] = {}

    def sha256(self) -> str:
        self._weights_sha256 = self._weights_sha256 or self._checkpoint.files.sha256()
        return self._checkpoint.sha256(self._weights_sha256)

    def model(self) -> HybridModel:
        return self._model

    def candidate(self, prefill: int = 0) -> StatefulCandidate:
        return CheckpointCandidate(self._model, self._device, prefill)

    def steps(self, batch: int) -> Steps:
        return Decoder(self._model, batch, self._device)

    def bytes_read_per_step(self) -> int:
        return 0 if fits_in_memory(self._model) else sizes.stored_bytes(self._model.units)


class OnnxArtifact:
    """An exported model.onnx under onnxruntime."""

    runtime = "onnxruntime"

    def __init__(self, path: Path):
        reading = plugins.graph_reading()
        self.folder, self._path, self._graph = onnx_layouts.folder_of(path), path, reading.load(path)
        self._sha256: str | None = None
        self.config = reading.architecture(self._graph, path).config
        tensors = reading.external_tensors(self._graph)
        self._data, self.formats = {Path(tensor.path) for tensor in tensors}, reading.stored_parameters(tensors)
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors)
        self.bodies: Mapping[str, int] = twin.edges(self._graph)

    def sha256(self) -> str:
        if self._sha256 is None:
            files = sorted(file for file in {self._path, *self._data} if file.is_file())
            self._sha256 = hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()
        return self._sha256

    def model(self) -> HybridModel:
        return plugins.graph_reading().hybrid(self._graph, self._path)

    def candidate(self, prefill: int = 0) -> StatefulCandidate:
        return OnnxCandidate(self._path, prefill=prefill)

    def steps(self, batch: int) -> Steps:
        return OnnxDecoder(OnnxSession(self._path).start(batch))

    def bytes_read_per_step(self) -> int:
        return 0


def open_artifact(path: Path, device: str = "cpu") -> Artifact:
    """Opens what `find_artifact` found."""
    if path.suffix == ".onnx":
        return OnnxArtifact(path)
    return CheckpointArtifact(Checkpoint(path, allow_quantized=True), device)
