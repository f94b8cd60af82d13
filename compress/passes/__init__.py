"""Transformations of a model's layers. A pass is one file named by its recipe key, with one class: a `Pass`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol, Self, final

from compress.strict.json_text import Json
from compress.strict.models import Strict
from compress.strict.plugin import OptionsT, Plugin

if TYPE_CHECKING:  # a recipe is validated without torch
    from compress.calibration.inputs import LayerInputs, UnitInputs
    from compress.model.hybrid import HybridModel
    from compress.model.records import Change
    from compress.model.weight import Unit

Note = Mapping[str, Json]  # what a pass noted of a unit while it was calibrated
Found = Mapping[str, Json]  # what its survey found
Details = Mapping[str, Json]  # what report.json has of it


@dataclass(frozen=True)
class PassContext:
    """What a pass may know beyond its options and the unit. `found` is what its survey found, where it makes one."""

    device: str
    seed: int
    found: Found | None = None


class Fact(NamedTuple):
    """A sentence for the plan, the report and the model card; `about` is the word before it in the plan."""

    about: str
    text: str


class Coverage(NamedTuple):
    """How calibration reached the experts: the fewest tokens of one; those that too few reached, and in `sentence` what was
    done about them, as in "3 experts SENTENCE". `loads` has the tokens of every expert by layer."""

    min_tokens: int
    below: tuple[str, ...] = ()
    sentence: str = ""
    loads: Mapping[int, Sequence[int]] = MappingProxyType({})


class Trial(NamedTuple):
    """One way to store one part of the model, and the mean KL divergence that it alone costs, in nats (None where that is
    not finite)."""

    part: str
    way: str
    kl_divergence_mean: float | None
    chosen: bool


class Cost(NamedTuple):
    """What keeping states in narrow formats costs on the calibration windows, decoded token by token. `decode_drift_ratio` is
    None where no window reaches the tokens it looks at; either may be infinite or NaN."""

    kl_divergence_mean: float
    decode_drift_ratio: float | None


class Finished(Protocol):
    """The checkpoint as all passes left it, which nobody has seen yet, and what decoding the calibration windows with its
    states kept in other ways costs against unrounded ones. What was measured is kept over an interruption."""

    @property
    def model(self) -> HybridModel: ...

    @property
    def unrounded(self) -> HybridModel:
        """The same model with all states in float32."""

    def alone(self, tried: Sequence[tuple[int, HybridModel]]) -> list[Cost]:
        """Of models that differ from the unrounded one in the states of that one layer: it is decoded, the layers above
        it run in one pass."""

    def together(self, tried: HybridModel) -> Cost:
        """Of a model of which any states may differ, decoded as a whole."""


class Pass(Plugin[OptionsT]):
    """A pass, bound to its block in a recipe: `self.options`. `Options.idle()` names the keys that change nothing as the
    others stand, which a plan leaves out.

    Hooks are called in the order in which they stand here. All but `apply` have defaults.
    """

    _together = (("needs_calibration", "calibrate"), ("needs_survey", "survey"), ("needs_settling", "settle"))

    spoken_for: ClassVar[frozenset[str]] = frozenset()  # keys of `details` that report.md need not show as they are
    follows_surveys: ClassVar[bool] = (
        False  # restructures, but may follow a pass that shares a budget: whatever that finds
    )
    scratch_states: ClassVar[int] = 0  # copies of the hidden states it keeps on disk while it works on a layer

    def fitted(self, model: HybridModel) -> tuple[Self, tuple[str, ...]]:
        """The pass as it applies to this model, and sentences on what is different from what its options say. All that
        follows is asked of the fitted one."""
        return self, ()

    def requires(self, model: HybridModel) -> None:
        """Raises InputError for what can be refused before any weight is read; `model` as the passes before it leave it."""

    @abstractmethod
    def apply(self, unit: Unit, context: PassContext) -> Unit:
        """The unit with its weights replaced, lazily: nothing is computed until a weight is loaded, and format and shape
        are known before that, which is how sizes are predicted.

        It is called for every unit before the run, as the plan, and for an embedding that is no output matrix."""

    def restructure(self, model: HybridModel, context: PassContext) -> HybridModel:
        """The model as the pass will leave it: for a pass that changes which tensors there are, its configuration and
        `config_json` included. Weights that depend on data need not load. `context.found` is None before the survey."""
        return replace(model, units=tuple(self.apply(unit, context) for unit in model.units))

    @property
    def needs_survey(self) -> bool:
        """Whether it must see every layer before it changes the first, to share a budget among them. It must be the
        first pass then."""
        return False

    def survey(self, layers: Iterator[tuple[Unit, LayerInputs]], context: PassContext) -> Found:
        """Looks at every layer as it came, with what reaches it; returns what the other hooks are given as
        `context.found`. It is kept over an interruption."""
        raise NotImplementedError

    @property
    def needs_calibration(self) -> bool:
        """Whether it looks at calibration data."""
        return False

    def calibrate(self, unit: Unit, inputs: UnitInputs, context: PassContext) -> tuple[Unit, Note]:
        """Like `apply` for one layer or the head, with `inputs` to see what reaches its matrices; returns the unit and a
        note, which is kept over an interruption.

        Names, formats, shapes and activations must be those that `apply`, or `restructure`, promised: the shard's layout
        was fixed by them. Replace weights as levels are finished: later levels then see the new ones. `inputs.keep` is for
        a weight that is finished: it is on disk then, and later passes must leave it as it is.
        """
        raise NotImplementedError

    @property
    def needs_settling(self) -> bool:
        """Whether something of it can only be decided on the finished checkpoint, since it takes what all passes left."""
        return False

    def settle(self, finished: Finished, context: PassContext) -> tuple[Strict, Note]:
        """Options with everything decided, which take the place of its own in recipe.resolved.yaml and in all that follows,
        and a note, which comes after those of `calibrate`. It is called once, when every shard is written: the options may
        change config.json, as `restructure` has it, and no tensor. Whoever applies them gets the same checkpoint."""
        raise NotImplementedError

    @property
    def least_window(self) -> int:
        """The tokens that the longest calibration window must have."""
        return 2

    def changes(self, before: HybridModel, after: HybridModel, found: Found | None) -> tuple[Fact, ...]:
        """What whoever uses the model must know of what became of it."""
        return ()

    def records(self, before: HybridModel, after: HybridModel, notes: Sequence[Note]) -> Sequence[Change] | None:
        """What was done to each tensor, so that it can be judged against the original: config.json keeps it. None says
        that this is not told. `notes` are those of every unit that was calibrated, in order."""
        return None

    def details(self, units: Sequence[Unit], notes: Sequence[Note]) -> Details:
        """What report.json has of it, given the units as they are stored."""
        return {}

    def sentences(self, details: Details) -> list[str]:
        """Lines of report.md, in Markdown: the first stands beside the pass's name, the others below it. What `details` has
        beyond `spoken_for` follows as it is."""
        return []

    def coverage(self, details: Details) -> Coverage | None:
        """How calibration reached the experts, where it counted."""
        return None

    def trials(self, details: Details) -> Sequence[Trial]:
        """What it measured of single parts, where it did."""
        return ()

    @final
    @property
    def restructures(self) -> bool:
        """Whether it changes which tensors there are."""
        return self._defines("restructure")
