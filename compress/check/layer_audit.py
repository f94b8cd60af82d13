"""Output error of every layer, block and expert on the same inputs, against what rounding to nearest would give."""

from typing import NotRequired, TypedDict


class LayerAuditFacts(TypedDict):
    """`relative_error` is the mean over tokens of |y' - y|^2 / |h|^2, with h the hidden state that the block is added to."""

    artifact: str
    layer: int
    block: str
    expert: int | None
    tokens: int
    relative_error: float | None
    expected_at_most: float | None
    passed: bool
    note: NotRequired[str]
