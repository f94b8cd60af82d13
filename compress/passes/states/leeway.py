"""What is left to a search: the places that nothing names, what each may be kept in, and the bytes that follow, all from the
configuration."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compress.errors import InputError
from compress.formats.state_words import Kind
from compress.model import sizes
from compress.model.architecture import why_unfit
from compress.model.hybrid import HybridModel
from compress.model.states import StateSpec
from compress.passes.state_precision import KINDS, Auto, Options, Override, StateFormat
from compress.passes.states import deciding
from compress.passes.states.candidates import CANDIDATES, START
from compress.passes.states.deciding import NAME
from compress.passes.states.greedy import Place

Chosen = Mapping[Place, StateFormat]


@dataclass(frozen=True)
class Way:
    """One way to keep a place; bytes of a sequence."""

    format: StateFormat
    bytes: int


def free(options: Options, model: HybridModel) -> list[Place]:
    """What the search decides: named neither by kind nor by an override, and without static scales, which are there to stay."""
    places = {(layer.index, _kind(spec)): spec for layer in model.layers for spec in layer.states}
    left = (place for place in places if options.of(place[1], place[0]) is None)
    return [place for place in left if not places[place].precision.has_static_scale]


def begun(options: Options, model: HybridModel) -> Options:
    """The options with everything as the search begins; themselves where there is none."""
    if options.auto is None:
        return options
    return written(options, {place: START[place[1]] for place in free(options, model)}, model)


def written(options: Options, chosen: Chosen, model: HybridModel) -> Options:
    """The options with these formats in place of the search: of each kind the commonest, the others as overrides."""
    kinds: dict[str, StateFormat] = {}
    overrides = list(options.overrides)
    for kind in KINDS:
        groups: dict[StateFormat, list[int]] = {}
        for (layer, of), wanted in sorted(chosen.items()):
            if of == kind:
                groups.setdefault(wanted, []).append(layer)
        if groups and _decides_all(options, kind, chosen, model):
            kinds[kind] = commonest = max(groups, key=lambda wanted: len(groups[wanted]))
            del groups[commonest]
        for wanted, layers in groups.items():
            overrides.append(Override(kind=kind, layers=tuple(layers), **wanted.model_dump()))
    return options.model_copy(update={**kinds, "overrides": tuple(overrides), "auto": None})


def _decides_all(options: Options, kind: Kind, chosen: Chosen, model: HybridModel) -> bool:
    """Whether a format for the whole kind would speak of nothing else than what was chosen."""
    having = [layer.index for layer in model.layers if any(spec.kind == kind for spec in layer.states)]
    return all((layer, kind) in chosen or options.of(kind, layer) is not None for layer in having)


def only(place: Place, wanted: StateFormat) -> Options:
    """Options that speak of one place."""
    return Options(overrides=(Override(kind=place[1], layers=(place[0],), **wanted.model_dump()),))


def ways(place: Place, model: HybridModel, context: int) -> list[Way]:
    """How it begins, then what it may be narrowed to; where two take the same bytes, the later in the table."""
    start = _way(place, START[place[1]], model, context)
    found = (_way(place, wanted, model, context) for wanted in CANDIDATES[place[1]])
    smaller = {way.bytes: way for way in found if way is not None and start is not None and way.bytes < start.bytes}
    assert start is not None  # plain formats fit any state
    return [start, *smaller.values()]


def table(options: Options, model: HybridModel, context: int) -> dict[Place, list[Way]]:
    return {place: ways(place, model, context) for place in free(options, model)}


def bytes_at(options: Options, model: HybridModel, context: int) -> int:
    """Of all that a sequence keeps after so many tokens, where states are kept so."""
    return sizes.state_bytes(deciding.architecture(options, model, seed=0)).at(context)


def least_bytes(options: Options, model: HybridModel, context: int) -> int:
    """With everything left to the search as narrow as it may be."""
    narrowable = table(options, model, context).values()
    spare = sum(ways[0].bytes - min(way.bytes for way in ways) for ways in narrowable)
    return bytes_at(begun(options, model), model, context) - spare


def refuse_unreachable(options: Options, model: HybridModel) -> None:
    """Raises InputError for a search that has nothing to decide, and for fewer bytes than there can be."""
    auto = options.auto
    if auto is None:
        return
    if not any(len(ways) > 1 for ways in table(options, model, auto.context).values()):
        raise InputError(
            f"{NAME}.auto: nothing is left to narrow: what this model keeps is named, or has static scales"
        )
    least = least_bytes(options, model, auto.context)
    if auto.bytes is not None and auto.bytes < least:
        raise InputError(
            f"{NAME}.auto: bytes is {auto.bytes:,}, but what is kept of {auto.context:,} tokens takes {least:,} at least; "
            f"give {least} or more"
        )


def prospects(auto: Auto, options: Options, model: HybridModel) -> Iterator[str]:
    """What the plan says of a search that is still to come."""
    most, least = bytes_at(begun(options, model), model, auto.context), least_bytes(options, model, auto.context)
    span = f"between {least:,} and {most:,} bytes a sequence at {auto.context:,} tokens"
    counts = Counter(kind for _, kind in free(options, model))
    where = ", ".join(f"{kind} of {count} layers" for kind, count in counts.items() if CANDIDATES[kind])
    if auto.bytes is None:
        goal = f"as few bytes as keep {auto.measured} within {auto.budget:g}"
    elif most <= auto.bytes:
        goal = f"nothing: {auto.bytes:,} bytes hold it as it begins"
    else:
        goal = f"the least loss in {auto.bytes:,} bytes"
    yield f"chosen by search, by what decoding the calibration windows costs: {goal}; {span} ({where})."


def _way(place: Place, wanted: StateFormat, model: HybridModel, context: int) -> Way | None:
    """None where a state of the place cannot be kept so."""
    options, plain = only(place, wanted), {spec.name: spec for spec in model.architecture.layer(place[0]).states}
    for state in deciding.decided(options, model.layer(place[0]), seed=0):
        if why_unfit(state, plain[state.state]):
            return None
    layer = deciding.architecture(options, model, seed=0).layer_as_kept(place[0])
    return Way(wanted, sum(spec.bytes(context) for spec in layer.states if spec.kind == place[1]))


def _kind(spec: StateSpec) -> Kind:
    return next(kind for kind in KINDS if kind == spec.kind)
