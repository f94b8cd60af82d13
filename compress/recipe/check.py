"""What a check is asked to do, and the metrics it knows. No model code here: recipes import this."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator

from compress.strict.models import KeyedError, Number, Strict, WholeNumber

PHASES = ("prefill", "decode")


MetricName = Literal["perplexity_ratio", "kl_divergence_mean", "kl_divergence_p99", "top1_agreement"]


@dataclass(frozen=True)
class Metric:
    name: MetricName
    bound: str  # "above": the value must not exceed the limit; "below": it must not fall under it
    meaning: str
    most: float = math.inf  # no value is above this

    def holds(self, value: float, limit: float) -> bool:
        return value <= limit if self.bound == "above" else value >= limit


METRICS: dict[MetricName, Metric] = {
    metric.name: metric
    for metric in (
        Metric("perplexity_ratio", "above", "candidate / baseline perplexity"),
        Metric("kl_divergence_mean", "above", "mean KL(baseline || candidate), nats per token"),
        Metric("kl_divergence_p99", "above", "99th percentile of KL(baseline || candidate), nats"),
        Metric("top1_agreement", "below", "share of positions with the same most likely token", most=1.0),
    )
}

Limit = Annotated[Number, Field(ge=0)]


class Check(Strict):
    """The recipe's `check` block. `samples` windows of `length` tokens are the most taken from each prompt set."""

    prompts: tuple[str, ...] = Field(default=("heldout",), min_length=1)
    samples: WholeNumber = Field(default=48, ge=1, le=1_000_000)
    length: WholeNumber = Field(default=512, ge=2, le=1_048_576)
    limits: dict[MetricName, Limit] = Field(default_factory=dict)

    @field_validator("limits")
    @classmethod
    def _can_be_met(cls, limits: dict[MetricName, float]) -> dict[MetricName, float]:
        for name, limit in limits.items():
            if limit > METRICS[name].most:
                raise KeyedError(
                    name,
                    f"no value can reach {limit:.15g}: it is a {METRICS[name].meaning}, so {METRICS[name].most:g} at most",
                )
            if name == "perplexity_ratio" and limit == 0:
                raise KeyedError(name, "no value can be as low as 0; a ratio of 1 is an unchanged perplexity")
        return limits

    @field_validator("prompts")
    @classmethod
    def _no_calibration_prompts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if "prose" in prompts:
            raise ValueError("'prose' is kept for calibration; a check uses heldout, self, recall or a file")
        if len(set(prompts)) != len(prompts):
            raise ValueError("a prompt set is listed twice")
        return prompts
