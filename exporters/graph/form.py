"""Which part of a model a graph is, and which of its dimensions are fixed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from compress.runtime.graph_names import DIMENSIONS, PAST, SEQUENCE, TOTAL


@dataclass(frozen=True)
class Form:
    """`layers`: those of a stage, all by default; the embedding goes with the first, the head with the last. `sizes`: numbers
    of dimensions by name; that of all tokens follows from past and new ones. `decode_only`: one new token at a time, which
    is no padding."""

    layers: range | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    decode_only: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that name no dimension or contradict each other."""
        if unknown := self.sizes.keys() - {*DIMENSIONS}:
            raise ValueError(f"'{min(unknown)}' is no dimension of a graph; expected some of {', '.join(DIMENSIONS)}")
        if self.decode_only and self.sizes.get(SEQUENCE, 1) != 1:
            raise ValueError(f"{SEQUENCE} is {self.sizes[SEQUENCE]}; a decode-only graph takes one token")
        parts = self._size(PAST), self._size(SEQUENCE)
        if TOTAL in self.sizes and self.sizes[TOTAL] != self._total(*parts):
            raise ValueError(f"{TOTAL} is {self.sizes[TOTAL]}; it follows from {PAST} and {SEQUENCE}")

    def shape(self, dimensions: Sequence[int | str]) -> list[int | str]:
        """Names replaced by their numbers, where they have one."""
        return [size if isinstance(size, int) else self._size(size) for size in dimensions]

    def _size(self, name: str) -> int | str:
        if name == TOTAL:
            return self._total(self._size(PAST), self._size(SEQUENCE))
        return 1 if name == SEQUENCE and self.decode_only else self.sizes.get(name, name)

    @staticmethod
    def _total(past: int | str, new: int | str) -> int | str:
        return past + new if isinstance(past, int) and isinstance(new, int) else TOTAL

    def layers_of(self, count: int) -> range:
        """Of a model with so many. Raises ValueError for others."""
        layers = range(count) if self.layers is None else self.layers
        if layers.step != 1 or not 0 <= layers.start < layers.stop <= count:
            raise ValueError(f"{layers} are no neighbouring layers of a model with {count}")
        return layers


WHOLE = Form()
