"""Which of several ways to keep each state: the fewest bytes for a loss, or the least loss for so many bytes.

Every place (a layer and a kind of state) has choices, of which the first is where it begins. A move takes a place from one
choice to a smaller one. Moves are taken by loss per byte, the cheapest first: that walks the lower convex hull of what can be
reached, so after every move no other map is both smaller and cheaper than this one, as far as losses add up.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from compress.formats.state_words import Kind

Place = tuple[int, Kind]  # a layer and a kind of its states


class Choice(NamedTuple):
    """Bytes of a sequence, and what it costs alone."""

    bytes: int
    loss: float


Table = Mapping[Place, Sequence[Choice]]


class Move(NamedTuple):
    """From one choice of a place to another, by number."""

    place: Place
    before: int
    after: int
    loss: float  # that it adds
    saved: int  # bytes

    @property
    def price(self) -> float:
        return self.loss / self.saved


Moves = tuple[Move, ...]


def within_loss(table: Table, most: float) -> Moves:
    """The moves that save most of what fits into this loss, the costliest per byte last."""

    def fits(taken: Moves, move: Move) -> bool:
        return lost(taken) + move.loss <= most

    return _taken(table, fits)


def within_bytes(table: Table, most: int) -> Moves:
    """The moves after which all places take at most so many bytes, or as few as there can be; one a place, none dearer than
    it must be where all others stay."""
    needless = size(table, ()) - most

    def fits(taken: Moves, move: Move) -> bool:
        return saved(taken) < needless

    taken = _taken(table, fits)
    return _spared(table, chosen(table, taken), max(most, size(table, taken)))


def chosen(table: Table, moves: Moves) -> dict[Place, int]:
    """The number of the choice of every place."""
    return dict.fromkeys(table, 0) | {move.place: move.after for move in moves}


def lost(moves: Moves) -> float:
    return sum(move.loss for move in moves)


def saved(moves: Moves) -> int:
    return sum(move.saved for move in moves)


def size(table: Table, moves: Moves) -> int:
    return sum(choices[0].bytes for choices in table.values()) - saved(moves)


def possible(table: Table, moves: Moves) -> Iterator[Move]:
    """Every next move."""
    for place, at in chosen(table, moves).items():
        now = table[place][at]
        for number, choice in enumerate(table[place]):
            if choice.bytes < now.bytes:
                yield Move(place, at, number, choice.loss - now.loss, now.bytes - choice.bytes)


def _taken(table: Table, fits: Callable[[Moves, Move], bool]) -> Moves:
    taken: Moves = ()
    while next_ones := [move for move in possible(table, taken) if fits(taken, move)]:
        taken = (*taken, min(next_ones, key=lambda move: (move.price, move.place, move.after)))
    return taken


def _spared(table: Table, at: Mapping[Place, int], most: int) -> Moves:
    """Straight to these choices, but where a dearer one is needless: the last move may have saved more than was asked for."""
    at = dict(at)
    while cheaper := [
        Move(place, at[place], number, choice.loss - now.loss, now.bytes - choice.bytes)
        for place, now in ((place, table[place][number]) for place, number in at.items())
        for number, choice in enumerate(table[place])
        if choice.loss < now.loss and _bytes(table, at) - now.bytes + choice.bytes <= most
    ]:
        best = min(cheaper, key=lambda move: (move.loss, move.place, move.after))
        at[best.place] = best.after
    return tuple(_straight(table, place, number) for place, number in at.items() if number)


def _straight(table: Table, place: Place, number: int) -> Move:
    begun, choice = table[place][0], table[place][number]
    return Move(place, 0, number, choice.loss - begun.loss, begun.bytes - choice.bytes)


def _bytes(table: Table, at: Mapping[Place, int]) -> int:
    return sum(table[place][number].bytes for place, number in at.items())
