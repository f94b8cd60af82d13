"""What a check is asked to do, and the metrics it knows. No model code here: recipes import this."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from compress.strict.json_text import Json
from compress.strict.models import KeyedError, Number, Strict, WholeNumber

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
DEFAULT = "default"  # in the place of limits: what the artifact's formats are expected to cost
DRIFT_FROM = 257  # the first token that `decode_drift_ratio` looks at

MetricName = Literal[
    "perplexity_ratio",
    "kl_divergence_mean",
    "kl_divergence_reverse_mean",
    "kl_divergence_p50",
    "kl_divergence_p95",
    "kl_divergence_p99",
    "kl_divergence_p999",
    "kl_divergence_tail_ratio",
    "top1_agreement",
    "top1_accuracy_drop",
    "decode_drift_ratio",
    "decode_prefill_difference",
    "recall_accuracy_drop",
    "task_accuracy_drop",
]


@dataclass(frozen=True)
class Metric:
    name: MetricName
    bound: str  # "above": the value must not exceed the limit; "below": it must not fall under it
    meaning: str
    least: float = 0.0  # no value is below this
    most: float = math.inf  # nor above this
    phases: tuple[str, ...] = PHASES
    unmeasured: str = ""  # why a check may have no value of it; empty where it always has
    is_shown: bool = False  # on the terminal, without a limit too

    @property
    def best(self) -> float:
        """The end of its range that a limit can ask for."""
        return self.least if self.bound == "above" else self.most

    def holds(self, value: float, limit: float) -> bool:
        return value <= limit if self.bound == "above" else value >= limit


METRICS: dict[MetricName, Metric] = {
    metric.name: metric
    for metric in (
        Metric("perplexity_ratio", "above", "candidate / baseline perplexity", is_shown=True),
        Metric("kl_divergence_mean", "above", "mean KL(baseline || candidate), nats per token", is_shown=True),
        Metric("kl_divergence_reverse_mean", "above", "mean KL(candidate || baseline), nats per token"),
        Metric("kl_divergence_p50", "above", "median of KL(baseline || candidate), nats"),
        Metric("kl_divergence_p95", "above", "95th percentile of KL(baseline || candidate), nats"),
        Metric("kl_divergence_p99", "above", "99th percentile of KL(baseline || candidate), nats", is_shown=True),
        Metric("kl_divergence_p999", "above", "99.9th percentile of KL(baseline || candidate), nats"),
        Metric(
            "kl_divergence_tail_ratio",
            "above",
            "99th percentile of KL(baseline || candidate) by its mean; 1 where nothing differs",
        ),
        Metric(
            "top1_agreement", "below", "share of positions with the same most likely token", most=1.0, is_shown=True
        ),
        Metric(
            "top1_accuracy_drop",
            "above",
            "baseline minus candidate share of positions with the text's token on top",
            least=-1.0,
        ),
        Metric(
            "decode_drift_ratio",
            "above",
            f"candidate / baseline perplexity over tokens {DRIFT_FROM} and later, decoded token by token",
            phases=("decode",),
            unmeasured=f"no window has the {DRIFT_FROM + 1} tokens it takes, or more; set 'length'",
            is_shown=True,
        ),
        Metric(
            "decode_prefill_difference",
            "above",
            "root mean square of what decoding token by token changes in the candidate's own log-probabilities, nats",
            phases=("decode",),
        ),
        Metric(
            "recall_accuracy_drop",
            "above",
            "baseline minus candidate share of recall questions answered exactly",
            least=-1.0,
            unmeasured="no recall question was scored; add 'recall' to 'prompts', or lower 'prefill'",
            is_shown=True,
        ),
        Metric(
            "task_accuracy_drop",
            "above",
            "baseline minus candidate share of items of 'tasks' answered rightly",
            least=-1.0,
            phases=("prefill",),
            unmeasured="no task was given; list files in 'tasks' (--tasks FILE)",
            is_shown=True,
        ),
    )
}

NOT_ZERO = ("perplexity_ratio", "decode_drift_ratio")
Limit = Annotated[Number, Field(ge=0)]
Distance = Annotated[WholeNumber, Field(ge=0, le=1_048_576)]


class Recall(Strict):
    """What the prompt set `recall` asks where it is to ask at known distances: at least `trials` questions at each of
    `distances`, in tokens of prose between the facts and the questions."""

    distances: tuple[Distance, ...] = Field(min_length=1)
    trials: WholeNumber = Field(default=400, ge=1, le=1_000_000)

    @field_validator("distances")
    @classmethod
    def _each_once(cls, distances: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(distances)) != len(distances):
            raise ValueError("a distance is listed twice")
        return distances


class Generate(Strict):
    """Texts that baseline and artifact go on with, each from the first `prompt_tokens` tokens of a window: `prompts` of them,
    for `tokens` tokens at most."""

    prompts: WholeNumber = Field(default=8, ge=1, le=1_000_000)
    tokens: WholeNumber = Field(default=64, ge=1, le=1_048_576)
    prompt_tokens: WholeNumber = Field(default=32, ge=1, le=4096)


def limits_written_out(limits: Json) -> Json:
    """What the word for default limits stands for: a mapping that others may be named in."""
    return {DEFAULT: True} if limits == DEFAULT else limits


class Check(Strict):
    """The recipe's `check` block. `samples` windows of `length` tokens are the most taken from each prompt set; decoding
    begins with the first `prefill` tokens of each in one call. `recall` replaces the windows of the set of that name.
    `audit`: whether every stored tensor and every layer is held against the original. `states`: whether states are looked at
    while windows are decoded; None looks where an artifact keeps them in formats of their own. `tasks` are .jsonl files of
    questions and texts to complete. `on_undecided`: whether a verdict of that name ends as a failure does."""

    prompts: tuple[str, ...] = Field(default=("heldout",), min_length=1)
    samples: WholeNumber = Field(default=48, ge=1, le=1_000_000)
    length: WholeNumber = Field(default=512, ge=2, le=1_048_576)
    prefill: WholeNumber = Field(default=0, ge=0, le=1_048_574)
    recall: Recall | None = None
    audit: bool = True
    states: bool | None = None
    generate: Generate | None = None
    tasks: tuple[str, ...] = ()
    limits: dict[MetricName, Limit] = Field(default_factory=dict)
    on_undecided: Literal["fail", "pass"] = "fail"
    _by_default: bool = PrivateAttr(default=False)

    @property
    def limited_by_default(self) -> bool:
        """Whether metrics that `limits` does not name are limited by what the artifact's formats are expected to cost."""
        return self._by_default

    def with_limits(self, limits: dict[MetricName, float]) -> Self:
        """The same check with these in place of others of the same metrics."""
        return self.model_copy(update={"limits": self.limits | limits})

    def idle(self) -> set[str]:
        """So that `--set check.prompts=[heldout]` will do."""
        return set() if "recall" in self.prompts else {"recall"}

    @model_validator(mode="wrap")
    @classmethod
    def _word_among_limits(cls, given: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        limits = limits_written_out(given.get("limits")) if isinstance(given, dict) else None
        if not isinstance(given, dict) or not isinstance(limits, dict) or limits.get(DEFAULT) is not True:
            return handler(given)
        found = handler({**given, "limits": {name: limit for name, limit in limits.items() if name != DEFAULT}})
        found._by_default = True
        return found

    @model_serializer(mode="wrap")
    def _with_the_word(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        plain: dict[str, object] = handler(self)
        if self._by_default and "limits" in plain:
            named = {str(metric): limit for metric, limit in self.limits.items()}
            plain["limits"] = {DEFAULT: True} | named if named else DEFAULT
        return plain

    @field_validator("limits", mode="before")
    @classmethod
    def _word_or_mapping(cls, limits: object) -> object:
        if isinstance(limits, dict):
            return limits
        raise ValueError(f"expected '{DEFAULT}', or a mapping of METRIC: VALUE, not {limits!r:.80}")

    @field_validator("limits")
    @classmethod
    def _can_be_met(cls, limits: dict[MetricName, float]) -> dict[MetricName, float]:
        for name, limit in limits.items():
            if limit > METRICS[name].most:
                raise KeyedError(
                    name,
                    f"no value can reach {limit:.15g}: it is a {METRICS[name].meaning}, so {METRICS[name].most:g} at most",
                )
            if name in NOT_ZERO and limit == 0:
                raise KeyedError(name, "no value can be as low as 0; a ratio of 1 is an unchanged perplexity")
        return limits

    @field_validator("tasks")
    @classmethod
    def _each_task_once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(tasks)) != len(tasks):
            raise ValueError("a task file is listed twice")
        return tasks

    @field_validator("prompts")
    @classmethod
    def _no_calibration_prompts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if "prose" in prompts:
            raise ValueError("'prose' is kept for calibration; a check uses heldout, self, recall or a file")
        if len(set(prompts)) != len(prompts):
            raise ValueError("a prompt set is listed twice")
        return prompts

    @model_validator(mode="after")
    def _leaves_something_to_decode(self) -> "Check":
        if self.prefill > self.length - 2:
            raise KeyedError("prefill", f"{self.prefill} tokens of {self.length} leave nothing to decode and score")
        return self
