"""An opened model."""

from collections.abc import Iterator
from dataclasses import dataclass

from compress.model.architecture import Architecture
from compress.model.block import Layer
from compress.model.config import Config
from compress.model.roles import Role
from compress.model.weight import Unit, Weight
from compress.strict.json_text import JsonObject


@dataclass(frozen=True)
class HybridModel:
    """A family bound to a configuration, its units in order of computation, and config.json as it is."""

    architecture: Architecture
    units: tuple[Unit, ...]
    config_json: JsonObject

    @property
    def config(self) -> Config:
        return self.architecture.config

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.units if unit.name == name)

    def layer(self, index: int) -> Layer:
        return self.architecture.layers[index]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.architecture.layers

    @property
    def model_type(self) -> str:
        return self.architecture.model_type

    @property
    def embedding(self) -> Weight:
        return self.unit("embedding").weights[self.architecture.EMBEDDING]

    @property
    def final_norm(self) -> Weight:
        return self.unit("head").weights[self.architecture.FINAL_NORM]

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the output matrix too."""
        return self.architecture.LM_HEAD not in self.unit("head").weights

    @property
    def output_matrix(self) -> Weight:
        """[V, H]: the LM head, or the embedding it is tied to."""
        return self.embedding if self.is_tied else self.unit("head").weights[self.architecture.LM_HEAD]

    @property
    def weights(self) -> Iterator[Weight]:
        return (weight for unit in self.units for weight in unit.weights.values())

    @property
    def travellers(self) -> tuple[Weight, ...]:
        """Tensors that nothing here runs, which travel with the others as they came."""
        return tuple(weight for weight in self.weights if weight.role == Role.MTP)

    @property
    def parameters(self) -> int:
        """Scales of states are none."""
        return sum(weight.parameters for weight in self.weights if weight.role != Role.STATE_SCALE)
