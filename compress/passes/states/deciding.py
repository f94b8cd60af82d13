"""How each state of a model is to be kept, and what becomes of config.json."""

from collections.abc import Iterator
from dataclasses import replace

from compress.errors import InputError, WorkError
from compress.formats.state_words import SEEDS, residual_of
from compress.model import records, sizes
from compress.model.architecture import Architecture, why_unfit
from compress.model.block import Layer
from compress.model.hybrid import HybridModel
from compress.model.records import KeptState
from compress.model.roles import Role
from compress.model.states import StateKind, StateSpec
from compress.model.weight import Spec, Stored, Unit, UnitSpec, Weight
from compress.passes.state_precision import Options, Override
from compress.prompts.seeds import derive_seed
from compress.strict.json_text import JsonObject

NAME = "state_precision"
PER_CHANNEL = 1  # the block of a cache's static scales, as GroupQueryAttention takes them


def decided(options: Options, layer: Layer, seed: int) -> Iterator[KeptState]:
    """The states of a layer that the options speak of; each that is rounded with a dither has a seed of its own."""
    for spec in layer.states:
        wanted = options.of(spec.kind, layer.index)
        if wanted is None:
            continue
        block, own = wanted.block, 0
        if block is None and spec.kind == StateKind.KV and wanted.scale == "static":
            block = PER_CHANNEL
        if wanted.rounding == "stochastic":
            given = seed if wanted.seed is None else wanted.seed
            own = derive_seed(given, NAME, str(layer.index), spec.name) % SEEDS
        yield KeptState(
            layer=layer.index, state=spec.name, format=wanted.format, rounding=wanted.rounding,
            residual=residual_of(wanted), every=wanted.every, scale=wanted.scale, axis=wanted.axis, block=block, seed=own,
        )  # fmt: skip


def refuse_unfit(options: Options, model: HybridModel) -> None:
    """Raises InputError for what this model's states cannot be."""
    for number, override in enumerate(options.overrides):
        _refuse_elsewhere(f"{NAME}.overrides.{number}", override, model)
    named = 0
    for layer in model.layers:
        specs = {spec.name: spec for spec in layer.states}
        for state in decided(options, layer, seed=0):
            named += 1
            _refuse_state(options, specs[state.state], state)
    if not named:
        raise InputError(f"{NAME}: this model has no state of the kinds that are named")


def _refuse_state(options: Options, spec: StateSpec, state: KeptState) -> None:
    if spec.precision.has_static_scale:
        raise InputError(
            f"{NAME}: {spec.name} of layer {state.layer} has static scales already, from an earlier pass or run; "
            "start from the original"
        )
    if why := why_unfit(state, spec):
        number = next((n for n, o in enumerate(options.overrides) if o.covers(spec.kind, state.layer)), None)
        where = spec.kind if number is None else f"overrides.{number}"
        raise InputError(f"{NAME}.{where}: {why} (layer {state.layer})")


def _refuse_elsewhere(where: str, override: Override, model: HybridModel) -> None:
    """A pattern of layers that matches nothing, in part or as a whole."""
    having = [layer.index for layer in model.layers if any(spec.kind == override.kind for spec in layer.states)]
    for index in override.layers or ():
        if not 0 <= index < len(model.layers):
            raise InputError(f"{where} names layer {index}, but the model has layers 0 to {len(model.layers) - 1}")
        if index not in having:
            known = f"layers {', '.join(map(str, having))} have one" if having else "no layer of this model has one"
            raise InputError(f"{where} names layer {index}, which has no {override.kind}; {known}")
    if not having:
        raise InputError(f"{where} covers nothing: no layer of this model has a {override.kind}")


def restated(options: Options, model: HybridModel, seed: int) -> HybridModel:
    """The model with its states kept so; static scales do not load before calibration has found them."""
    after, values = architecture(options, model, seed), _values(options, model, seed)
    units = zip(model.units, after.layout(), strict=True)
    planned = tuple(_with_scales(unit, spec) for unit, spec in units)
    return replace(model, architecture=after, units=planned, config_json=values)


def architecture(options: Options, model: HybridModel, seed: int) -> Architecture:
    """That of the model with its states kept so."""
    return type(model.architecture).parse(_values(options, model, seed), f"config.json after {NAME}")


def _values(options: Options, model: HybridModel, seed: int) -> JsonObject:
    states = [state for layer in model.layers for state in decided(options, layer, seed)]
    return records.with_states(model.config_json, states)


def _with_scales(unit: Unit, spec: UnitSpec) -> Unit:
    new = {tensor.name: _unknown(tensor) for tensor in spec.specs if tensor.role == Role.STATE_SCALE}
    return Unit(unit.name, {**unit.weights, **{name: w for name, w in new.items() if name not in unit.weights}})


def _unknown(spec: Spec) -> Weight:
    def load(rows: slice | None = None) -> Stored:
        raise WorkError(f"{spec.name}: scales of states are found by calibration")

    return Weight(spec.name, spec.role, spec.shape, "fp32", load)


def changes(before: HybridModel, after: HybridModel) -> Iterator[str]:
    """What a sequence takes, before and after."""
    came, left = (sizes.state_bytes(model.architecture) for model in (before, after))
    at = sizes.CONTEXTS[0]
    yield (
        f"what is remembered of {at:,} tokens takes {left.at(at):,} bytes instead of {came.at(at):,}, which counts float32 SSM "
        "states, 16-bit convolution states and KV where nothing else is said."
    )
