"""What an exported graph keeps between calls, as layers of the model it came from: for those who look at its states."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from compress import plugins
from compress.errors import InputError
from compress.model.block import Layer
from compress.runtime.graph_names import in_transformers_js, past_of
from compress.runtime.kept import Kept
from compress.runtime.onnx_session import Generation, OnnxSession


@dataclass(frozen=True)
class _Stored:
    """Tensors of the file's own that a layer's states are read with: static scales."""

    tensors: Mapping[str, torch.Tensor]
    prefix: str

    def __call__(self, name: str) -> torch.Tensor:
        return self.tensors[self.prefix + name]

    def linear(self, name: str, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError("no matrix is multiplied to read a state")


class GraphStates:
    """The states of a model.onnx, with the scales that stand in it. Raises InputError where its inputs are not those of the
    configuration that it carries."""

    def __init__(self, path: Path, session: OnnxSession):
        reading = plugins.graph_reading()
        graph = reading.load(path)
        self._layers = [layer for layer in reading.architecture(graph, path).layers if layer.states]
        self._inputs = {layer.index: _inputs(layer, session, path) for layer in self._layers}
        wanted = {layer.prefix + spec.scale_name for layer in self._layers for spec in layer.carried}
        stored = {tensor.name: tensor for tensor in reading.external_tensors(graph) if tensor.name in wanted}
        self._scales = {name: torch.from_numpy(t.numpy().astype(np.float32)) for name, t in stored.items()}

    def kept(self, generation: Generation, windows: Sequence[int], read: int, length: int) -> Iterator[Kept]:
        """What each layer keeps of the windows of a generation that has read so many tokens of them."""
        states = generation.states()
        for layer in self._layers:
            stored = {name: states[entry] for name, entry in self._inputs[layer.index].items()}
            yield Kept(layer, windows, read, length, stored, _Stored(self._scales, layer.prefix))


def _inputs(layer: Layer, session: OnnxSession, path: Path) -> dict[str, str]:
    """The graph's input for each of a layer's states, by name, in either layout."""
    found = {}
    for spec in layer.carried:
        names = (past_of(layer.index, spec), in_transformers_js(past_of(layer.index, spec)))
        known = [name for name in names if name in session.past]
        if not known:
            raise InputError(f"{path}: has no input {names[0]}, which the configuration in its metadata tells of")
        found[spec.name] = known[0]
    return found
