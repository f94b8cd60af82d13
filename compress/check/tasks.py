"""Multiple choice and cloze from a .jsonl file: which items baseline and candidate answer rightly."""

from typing import Literal, TypedDict


class TaskFacts(TypedDict):
    """`low` and `high` are of `change`, the candidate's accuracy minus the baseline's; `p_value` is McNemar's, exact."""

    artifact: str
    task: str
    kind: Literal["multiple_choice", "cloze"]
    items: int
    baseline_accuracy: float
    candidate_accuracy: float
    change: float
    low: float | None
    high: float | None
    only_baseline: int
    only_candidate: int
    p_value: float
