"""An opened model."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple, Protocol

import torch

from compress.model.config import Config
from compress.model.weight import Unit, Weight


class Weights(Protocol):
    """A layer's weights as its arithmetic sees them, by name within the layer."""

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor as float32."""

    def linear(self, name: str, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] times the transpose of the matrix [N, K]; the input is rounded first where it is stored so."""


class InputGroup(NamedTuple):
    """Matrices of a layer that multiply the same input; `expert` is the one they belong to."""

    names: tuple[str, ...]
    expert: int | None = None


class LayerGroups(NamedTuple):
    """The matrices of a layer's halves, level by level: a level's inputs depend on the matrices of earlier levels only."""

    mixer: tuple[tuple[InputGroup, ...], ...]
    feed_forward: tuple[tuple[InputGroup, ...], ...]


class Place(NamedTuple):
    """Where a tensor of a checkpoint belongs in transformers' model: a parameter, or a part of one."""

    parameter: str
    index: tuple[int | slice, ...] = ()


class Fold(NamedTuple):
    """`source` (a norm, or a matrix by its rows) produces, channel by channel, the input of the matrices `targets`.

    `others` see the same input and are never quantized."""

    source: str
    targets: tuple[str, ...]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class HybridModel:
    """An opened model: its architecture module, its validated configuration, its units in order of computation, and
    config.json as it is."""

    architecture: ModuleType
    config: Config
    units: tuple[Unit, ...]
    config_json: dict

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    @property
    def model_type(self) -> str:
        return self.architecture.__name__.rpartition(".")[2]

    @property
    def weights(self) -> Iterator[Weight]:
        return (weight for unit in self.units for weight in unit.weights.values())

    @property
    def parameters(self) -> int:
        return sum(weight.parameters for weight in self.weights)
