"""Whether to believe what a check found: figures that are too good. They change no verdict."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from compress.check import statistics
from compress.recipe.check import MetricName

if TYPE_CHECKING:
    from compress.check.compare import Found, Row

EXACT = 1e-9  # nats: more than rounding in another order makes of a divergence, less than any format does
SUSPICIOUS = (
    "suspicious, since compression does not do that of itself: were the prompts seen in calibration, or is the baseline another "
    "model or version?"
)


class _Gain(NamedTuple):
    """How a figure below `none`, which is that of no change, is read."""

    none: float
    words: str
    unit: str


GAINS: dict[MetricName, _Gain] = {
    "perplexity_ratio": _Gain(1, "perplexity improved by", "%"),
    "top1_accuracy_drop": _Gain(0, "top-1 accuracy rose by", "percentage points"),
    "recall_accuracy_drop": _Gain(0, "recall rose by", "percentage points"),
    "task_accuracy_drop": _Gain(0, "accuracy in tasks rose by", "percentage points"),
}


def remarks(found: "Found", is_baseline: Callable[[], bool]) -> Iterator[str]:
    """Sentences on one artifact, from what was found over all prompts. Whether it is the baseline, which takes reading it, is
    asked where the rows leave that open."""
    rows = [row for row in found.rows if row.prompts == "all"]
    artifact = rows[0].artifact
    exact = {
        row.phase for row in rows if row.metric == "kl_divergence_mean" and row.value is not None and row.value <= EXACT
    }
    if "prefill" in exact and is_baseline():
        yield f"{artifact} is the baseline itself: the same weights and configuration, compared with themselves"
    elif exact == {row.phase for row in rows}:
        yield f"{artifact} gives what the baseline gives, to rounding: nothing was compressed, or it is the same model"
    for metric, gain in GAINS.items():
        better = [row for row in rows if row.metric == metric and row.high is not None and row.high < gain.none]
        if better and (metric != "top1_accuracy_drop" or _has_flipped(found, better[0].phase)):
            yield f"{artifact}: {_improved(better[0], gain)}"


def _has_flipped(found: "Found", phase: str) -> bool:
    """Two or three flips that happen to be alike in every window have an interval of no width, and prove nothing."""
    return any(
        row["p_value"] < 1 - statistics.LEVEL for row in found.flips if (row["phase"], row["prompts"]) == (phase, "all")
    )


def _improved(row: "Row", gain: _Gain) -> str:
    assert row.value is not None and row.low is not None and row.high is not None  # it was just asked for
    value, least, most = (100 * (gain.none - edge) for edge in (row.value, row.high, row.low))
    return f"{gain.words} {value:.3g} {gain.unit} [{least:.3g} to {most:.3g}] in {row.phase}: {SUSPICIOUS}"
