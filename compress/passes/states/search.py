"""The search of `state_precision`: what each place costs alone, the cheapest map by that, and whether it holds as a whole."""

import math
from collections.abc import Sequence

from compress.errors import InputError
from compress.model.hybrid import HybridModel
from compress.passes import Cost, Finished, Note
from compress.passes.state_precision import Auto, Options
from compress.passes.states import deciding, greedy, leeway
from compress.passes.states.deciding import NAME
from compress.passes.states.findings import Figures, Search, Tried
from compress.passes.states.greedy import Choice, Moves, Place, Table
from compress.passes.states.leeway import Way

DEAREST = 1e9  # nats: no divergence that is a number comes near
LEAST, MOST = 1e-12, 700.0  # nats: above 0, and with an exponential that is a number


def settled(options: Options, finished: Finished, seed: int) -> tuple[Options, Note]:
    """Options that name what was chosen, and what was found; raises InputError for a budget that nothing meets."""
    auto = options.auto
    assert auto is not None, "nothing is left to a search"
    begun = leeway.begun(options, finished.model)
    size = leeway.bytes_at(begun, finished.model, auto.context)
    if auto.bytes is not None and size <= auto.bytes:
        return begun, {"search": Search(goal=auto, bytes_begun=size, bytes_found=size).to_json()}
    return _Searching(options, auto, finished, seed).found()


class _Searching:
    def __init__(self, options: Options, auto: Auto, finished: Finished, seed: int):
        self._options, self._auto, self._finished, self._seed = options, auto, finished, seed
        self._ways = leeway.table(options, finished.model, auto.context)
        self._fixed = leeway.bytes_at(leeway.begun(options, finished.model), finished.model, auto.context) - sum(
            ways[0].bytes for ways in self._ways.values()
        )
        self._joint: dict[Moves, Cost] = {}  # what was decoded as a whole

    def found(self) -> tuple[Options, Note]:
        start, costs = self._together(()), self._alone()
        table = {place: _choices(ways, costs[place]) for place, ways in self._ways.items()}
        moves = self._within_bytes(table) if self._auto.budget is None else self._within_budget(table, start)
        return self._named(moves), {"search": self._told(start, costs, table, moves).to_json()}

    def _alone(self) -> dict[Place, list[Cost]]:
        """What every way but the first costs where nothing else is rounded."""
        unrounded = self._finished.unrounded
        places = [(place, way) for place, ways in self._ways.items() for way in ways[1:]]
        tried = [(place[0], self._restated(leeway.only(place, way.format), unrounded)) for place, way in places]
        costs: dict[Place, list[Cost]] = {place: [] for place in self._ways}
        for (place, _), cost in zip(places, self._finished.alone(tried), strict=True):
            costs[place].append(cost)
        return costs

    def _within_bytes(self, table: Table) -> Moves:
        """The arithmetic has said already that it can be met."""
        assert self._auto.bytes is not None
        moves = greedy.within_bytes(table, self._auto.bytes - self._fixed)
        self._together(moves)
        return moves

    def _within_budget(self, table: Table, start: Cost) -> Moves:
        """The moves of which the whole map was decoded and held; where it missed, the costliest per byte are undone."""
        assert self._auto.budget is not None
        room = self._as_divergence(self._auto.budget)
        moves = greedy.within_loss(table, room - start.kl_divergence_mean)
        while moves:
            cost = self._together(moves)
            if self._figure(cost) <= self._auto.budget:
                return moves
            moves = _fewer(moves, start.kl_divergence_mean, self._as_divergence(self._figure(cost)), room)
        return self._cheapest(table)

    def _cheapest(self, table: Table) -> Moves:
        """The one move that costs least, where nothing else held; a budget as high as what it takes is met by it again."""
        move = min(greedy.possible(table, ()), key=lambda move: (move.loss, move.place, move.after))
        figure, metric, budget = self._figure(self._together((move,))), self._auto.measured, self._auto.budget
        assert budget is not None
        if figure <= budget:
            return (move,)
        if math.isinf(figure):
            raise InputError(f"{NAME}.auto: {metric} is not finite on the calibration tokens, whatever is narrowed")
        would_do = _rounded_up(figure, 1.0 if metric == "decode_drift_ratio" else 0.0)
        layer, kind = move.place
        raise InputError(
            f"{NAME}.auto: no state can be narrowed within a {metric} of {budget:.15g}: {kind} of layer {layer} in "
            f"{self._ways[move.place][move.after].format.format} costs least, and takes {would_do}; give a budget of "
            f"{would_do} or more"
        )

    def _together(self, moves: Moves) -> Cost:
        if moves not in self._joint:
            model = self._restated(self._named(moves), self._finished.model)
            self._joint[moves] = self._finished.together(model)
        return self._joint[moves]

    def _named(self, moves: Moves) -> Options:
        """Options with these formats for what the search decides."""
        at = {move.place: move.after for move in moves}
        chosen = {place: ways[at.get(place, 0)].format for place, ways in self._ways.items()}
        return leeway.written(self._options, chosen, self._finished.model)

    def _restated(self, options: Options, model: HybridModel) -> HybridModel:
        return deciding.restated(options, model, self._seed)

    def _as_divergence(self, budget: float) -> float:
        """The mean KL divergence that predicts a figure of the metric: where text is as likely as the model thinks, a
        perplexity grows by its exponential."""
        return math.log(budget) if self._auto.measured == "decode_drift_ratio" else budget

    def _predicted(self, start: Cost, moves: Moves) -> float:
        """In the metric."""
        divergence = start.kl_divergence_mean + greedy.lost(moves)
        return math.exp(min(divergence, MOST)) if self._auto.measured == "decode_drift_ratio" else divergence

    def _figure(self, cost: Cost) -> float:
        """That of the metric; one that is not finite holds no budget."""
        value = cost.decode_drift_ratio if self._auto.measured == "decode_drift_ratio" else cost.kl_divergence_mean
        return math.inf if value is None or math.isnan(value) else value

    def _told(self, start: Cost, costs: dict[Place, list[Cost]], table: Table, moves: Moves) -> Search:
        at, begun = greedy.chosen(table, moves), self._fixed + greedy.size(table, ())
        tried = tuple(
            Tried(
                layer=place[0], kind=place[1], kept_as=way.format, cost=Figures.of(cost),
                bytes_saved=ways[0].bytes - way.bytes, chosen=at[place] == number,
            )
            for place, ways in self._ways.items()
            for number, (way, cost) in enumerate(zip(ways[1:], costs[place], strict=True), 1)
        )  # fmt: skip
        return Search(
            goal=self._auto, bytes_begun=begun, bytes_found=begun - greedy.saved(moves), begun=Figures.of(start),
            predicted=self._predicted(start, moves), confirmed=Figures.of(self._joint[moves]), decoded=len(self._joint),
            tried=tried,
        )  # fmt: skip


def _choices(ways: Sequence[Way], costs: Sequence[Cost]) -> list[Choice]:
    """By loss, which is 0 where nothing is narrowed; what is not finite is dearer than any."""
    losses = [0.0, *(cost.kl_divergence_mean for cost in costs)]
    return [Choice(way.bytes, loss if math.isfinite(loss) else DEAREST) for way, loss in zip(ways, losses, strict=True)]


def _fewer(moves: Moves, start: float, measured: float, room: float) -> Moves:
    """Without as many of the last moves as have to go if all cost as much more than predicted as the whole did; at least one.
    All figures are mean divergences."""
    more = max(1.0, measured / max(LEAST, start + greedy.lost(moves)))
    kept = moves[:-1]
    while kept and more * (start + greedy.lost(kept)) > room:
        kept = kept[:-1]
    return kept


def _rounded_up(figure: float, base: float) -> str:
    """To three digits of what it is above `base`, and never below the figure."""
    above = figure - base
    if not math.isfinite(above) or above <= 0:
        return f"{figure:.15g}"
    step = 10.0 ** (math.floor(math.log10(above)) - 2)
    return f"{base + math.ceil(above / step) * step:.12g}"
