"""What pruning, surveys and everything else that asks about experts speak to."""

from abc import ABC, abstractmethod
from typing import TypeVar

from compress.model.operators import Operators
from compress.model.routing import Router

T = TypeVar("T")


class Experts(ABC):
    """The experts of one layer. x [..., H] is what the router sees, rows [n, K] what an expert sees: K is H but where the block
    projects into a smaller space first (`inputs`, `output`)."""

    count: int
    router: Router

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Names of the matrices within an expert, the one that gives its output last."""

    @abstractmethod
    def prefix(self, expert: int) -> str:
        """What the names of an expert's tensors begin with, within the layer."""

    @abstractmethod
    def inputs(self, ops: Operators[T], x: T) -> T:
        """What the experts see of x."""

    @abstractmethod
    def hidden(self, ops: Operators[T], expert: int, rows: T) -> T:
        """What an expert's last matrix multiplies, [n, F]."""

    @abstractmethod
    def run_one(self, ops: Operators[T], expert: int, rows: T) -> T:
        """One expert, [n, K]."""

    @abstractmethod
    def output(self, ops: Operators[T], summed: T) -> T:
        """What the block makes of the experts' weighted sum [..., K]: [..., H]."""

    @abstractmethod
    def beside(self, ops: Operators[T], x: T) -> T | None:
        """What the block adds to that whatever the router says, [..., H]: a shared expert's output."""
