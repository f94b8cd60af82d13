"""What a family of models is to the rest of the code: its layers as blocks, and names."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

from compress.errors import InputError
from compress.formats.remembered import Precision
from compress.formats.state_words import residual_of, why_not_of_kind
from compress.model.block import Layer
from compress.model.config import Config
from compress.model.records import KeptState
from compress.model.roles import Role
from compress.model.states import D_INNER, SCALE_AXES, StateKind, StateSpec
from compress.model.weight import Spec, UnitSpec
from compress.strict.json_text import JsonObject
from compress.strict.plugin import ContractError, refuse_other_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REQUIRED = ("CONFIG", "EMBEDDING", "FINAL_NORM")  # of a family


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint belongs in transformers' model: a parameter, or a part of one."""

    parameter: str
    index: tuple[int | slice, ...] = ()


def precision_of(state: KeptState, kind: StateKind) -> Precision:
    """What config.json says of a state."""
    axis = D_INNER if state.axis == "d_inner" else SCALE_AXES[kind]
    residual = residual_of(state)
    return Precision(state.format, state.rounding, state.scale, axis, state.block, state.seed, residual, state.every)


def why_unfit(state: KeptState, spec: StateSpec) -> str | None:
    """What keeps a state from being kept so, or None."""
    return why_not_of_kind(state, spec.kind) or spec.why_unfit(precision_of(state, spec.kind))


class Architecture(ABC):
    """A configuration and what follows from it. A family is one file in `families/`, named by its `model_type`."""

    CONFIG: ClassVar[type[Config]]
    EMBEDDING: ClassVar[str]
    FINAL_NORM: ClassVar[str]
    LM_HEAD: ClassVar[str] = "lm_head.weight"
    # of config.json: how many experts a layer has; the first where none is there
    EXPERTS_KEYS: ClassVar[tuple[str, ...]] = ()
    TRAVELLING: ClassVar[tuple[str, ...]] = ()  # what names of tensors begin with that nothing here uses
    WITHOUT_TRAVELLERS: ClassVar[JsonObject] = {}  # what config.json says where those were left out

    def __init__(self, config: Config):
        self.config = config

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        refuse_other_hooks(cls, Architecture)
        if lacking := [name for name in REQUIRED if name not in dir(cls)]:
            raise ContractError(f"{cls.__name__} lacks {', '.join(lacking)}")

    @classmethod
    def parse(cls, values: JsonObject, source: str) -> Self:
        """Of a config.json; `source` says where it stands. Raises InputError naming it and the key."""
        architecture = cls(cls.CONFIG.parse(values, source))
        architecture._refuse_unfit_states(source)
        return architecture

    @property
    def model_type(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @abstractmethod
    def layer(self, index: int) -> Layer:
        """One layer's blocks."""

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(map(self.layer_as_kept, range(self.config.num_hidden_layers)))

    def layer_as_kept(self, index: int) -> Layer:
        """One layer, its states in the precisions that config.json says."""
        layer, kept = self.layer(index), self._kept_states.get(index, ())
        kinds = {spec.name: spec.kind for spec in layer.states}
        precisions = {state.state: precision_of(state, kinds[state.state]) for state in kept}
        return replace(layer, precisions=precisions) if precisions else layer

    @cached_property
    def _kept_states(self) -> dict[int, list[KeptState]]:
        """What config.json says of states, by layer."""
        found: dict[int, list[KeptState]] = {}
        for state in self.config.compress.states:
            found.setdefault(state.layer, []).append(state)
        return found

    def _refuse_unfit_states(self, source: str) -> None:
        """Raises InputError for states that are not there, stand there twice, or cannot be kept so."""
        taken: set[tuple[int, str]] = set()
        for number, state in enumerate(self.config.compress.states):
            if why := self._why_unfit(state, taken):
                raise InputError(f"{source}: compress.states.{number}: {why}")
            taken.add((state.layer, state.state))

    def _why_unfit(self, state: KeptState, taken: set[tuple[int, str]]) -> str | None:
        count = self.config.num_hidden_layers
        if state.layer >= count:
            return f"layer {state.layer} is not there, the model has {count}"
        if (state.layer, state.state) in taken:
            return f"{state.state} of layer {state.layer} stands there twice"
        specs = {spec.name: spec for spec in self.layer(state.layer).states}
        if state.state not in specs:
            known = f"it has {', '.join(specs)}" if specs else "it has none"
            return f"layer {state.layer} has no state '{state.state:.80}' ({known})"
        return why_unfit(state, specs[state.state])

    def layout(self) -> Iterator[UnitSpec]:
        """The units in order of computation, lazily: a caller may stop at the first surprise."""
        config = self.config
        yield UnitSpec("embedding", (Spec(self.EMBEDDING, (config.vocab_size, config.hidden_size), Role.EMBEDDING),))
        for index in range(config.num_hidden_layers):
            yield UnitSpec(f"layer.{index}", tuple(self.layer_as_kept(index).specs()))
        head = [Spec(self.FINAL_NORM, (config.hidden_size,), Role.NORM)]
        if not config.tie_word_embeddings:
            head.append(Spec(self.LM_HEAD, (config.vocab_size, config.hidden_size), Role.LM_HEAD))
        yield UnitSpec("head", tuple(head))

    def names_of_stored(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
        """What tensors are called here, by the names they have in files: several names for a stack of so many matrices.
        Raises ValueError where names follow more than one convention."""
        return {name: (name,) for name in shapes}

    def transformers_place(self, name: str) -> Place:
        """Where a tensor belongs in transformers' model."""
        return Place(name)

    def fit_transformers(self, model: "PreTrainedModel") -> None:  # noqa: B027 - most fit as they are
        """Replaces, in that model on the meta device, what its own configuration gives another shape than ours has."""
