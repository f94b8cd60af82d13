"""What a search found, as report.json has it and as report.md tells it."""

import itertools
from collections.abc import Callable
from typing import Self

from compress.formats.state_words import Kind
from compress.passes import Cost, Trial
from compress.passes.state_precision import Auto, StateFormat
from compress.strict.json_text import Json, JsonObject, finite
from compress.strict.models import Strict

Words = Callable[[StateFormat], str]


class Figures(Strict):
    """A `Cost`; None is not finite, or was not measured."""

    kl_divergence_mean: float | None = None
    decode_drift_ratio: float | None = None

    @classmethod
    def of(cls, cost: Cost) -> Self:
        return cls(
            kl_divergence_mean=finite(cost.kl_divergence_mean), decode_drift_ratio=finite(cost.decode_drift_ratio)
        )


class Tried(Strict):
    """One way to keep one kind of state in one layer, and what it costs where nothing else is rounded. `bytes_saved` of a
    sequence against how it began, at the search's context."""

    layer: int
    kind: Kind
    kept_as: StateFormat
    cost: Figures
    bytes_saved: int
    chosen: bool


class Search(Strict):
    """`begun` is the map it began with, decoded as a whole, and `confirmed` the one that was chosen; `predicted` is what the
    losses of single states add up to, in the goal's metric. None of the three where nothing had to be measured."""

    goal: Auto
    bytes_begun: int
    bytes_found: int
    begun: Figures | None = None
    predicted: float | None = None
    confirmed: Figures | None = None
    decoded: int = 0  # maps that were decoded as a whole
    tried: tuple[Tried, ...] = ()

    def to_json(self) -> JsonObject:
        found: JsonObject = self.model_dump(mode="json", exclude_none=True)
        return found


def sentences(details: Json, words: Words) -> list[str]:
    """For report.md: what came of it, then a line for each layer and kind with all that was tried, what was chosen in bold."""
    search = Search.model_validate(details)
    goal, confirmed, begun = search.goal, search.confirmed, search.begun
    if confirmed is None or begun is None:
        return [
            f"Searched: nothing is narrowed, since {search.bytes_found:,} bytes at {goal.context:,} tokens are within the "
            f"{goal.bytes:,} allowed."
        ]
    rows = itertools.groupby(search.tried, key=lambda tried: (tried.kind, tried.layer))
    listed = (f"{kind} of layer {layer}: {_list(list(ways), words)}." for (kind, layer), ways in rows)
    return [_outcome(search, confirmed, begun), *listed]


def trials(details: Json, words: Words) -> list[Trial]:
    """Of every layer and kind all that was tried."""
    tried = Search.model_validate(details).tried
    return [
        Trial(f"layer {one.layer}, {one.kind}", words(one.kept_as), one.cost.kl_divergence_mean, one.chosen)
        for one in tried
    ]


def _outcome(search: Search, confirmed: Figures, begun: Figures) -> str:
    goal = search.goal
    wanted = f"{goal.bytes:,} bytes" if goal.budget is None else f"{goal.measured} {goal.budget:g}"
    return (
        f"Searched for {wanted}: {search.bytes_found:,} bytes a sequence at {goal.context:,} tokens instead of "
        f"{search.bytes_begun:,}. Decoded as a whole: {_cost(confirmed)}; {goal.measured} predicted {search.predicted:.6g}. "
        f"As it began: {_cost(begun)}. Maps decoded: {search.decoded}. Of single states, mean KL in nats and bytes saved:"
    )


def _list(ways: list[Tried], words: Words) -> str:
    return "; ".join(f"**{_way(tried, words)}**" if tried.chosen else _way(tried, words) for tried in ways)


def _way(tried: Tried, words: Words) -> str:
    return f"{words(tried.kept_as)} {_number(tried.cost.kl_divergence_mean)}, {tried.bytes_saved:,}"


def _cost(cost: Figures) -> str:
    drift = "" if cost.decode_drift_ratio is None else f", decode_drift_ratio {cost.decode_drift_ratio:.6f}"
    return f"mean KL {_number(cost.kl_divergence_mean)}{drift}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"
