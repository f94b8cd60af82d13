"""The windows that the candidate changes most, with their text."""

from typing import TypedDict


class WorstFacts(TypedDict):
    """One window of a prompt set. `text` is what both read, `baseline_text` and `candidate_text` what each goes on with (None
    where neither was asked to). `perplexity_ratio` is None where it is not finite."""

    artifact: str
    phase: str
    prompts: str
    window: int
    kl_divergence_mean: float | None
    perplexity_ratio: float | None
    text: str | None
    baseline_text: str | None
    candidate_text: str | None
