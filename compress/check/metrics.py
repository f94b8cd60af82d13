"""What is compared at every scored position, and the metrics over them.

At each position the baseline gives a distribution p over the vocabulary, the candidate q, and the text a next token y:

    KL(p || q) = sum_v p_v (log p_v - log q_v)          nats
    perplexity = exp(mean of -log q_y)                   ratio: candidate / baseline
    top-1      = argmax p == argmax q

These are the figures of llama.cpp's `llama-perplexity --kl-divergence`, over the full vocabulary. Each is a statistic of the
windows too (`STATISTICS`), which tells its interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from compress.check import statistics
from compress.check.statistics import Array, Statistic
from compress.recipe.check import MetricName


@dataclass
class Scores:
    """One value per scored position."""

    nll_baseline: np.ndarray  # -log p_y, nats
    nll_candidate: np.ndarray  # -log q_y, nats
    kl_divergence: np.ndarray  # nats
    same_top1: np.ndarray  # bool
    right_baseline: np.ndarray  # bool: y is the most likely token
    right_candidate: np.ndarray  # bool

    @staticmethod
    def concatenate(parts: list["Scores"]) -> "Scores":
        return Scores(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in Scores.__dataclass_fields__)
        )


@dataclass(frozen=True)
class WindowScores:
    """Of consecutive positions of one window, the first of which is its token `first`."""

    first: int
    scores: Scores

    @property
    def tokens(self) -> int:
        """Of the window, those before the first position included."""
        return self.first + len(self.scores.kl_divergence)

    def between(self, first: int, last: float) -> Scores:
        """Of the tokens `first` to `last`, both included, as far as they were scored."""
        places = np.arange(self.first, self.first + len(self.scores.kl_divergence))
        inside = (first <= places) & (places <= last)
        return Scores(*(getattr(self.scores, name)[inside] for name in Scores.__dataclass_fields__))


def score(log_p: torch.Tensor, logits_q: torch.Tensor, targets: torch.Tensor) -> Scores:
    """log_p [n, V] log-probabilities of the baseline, logits_q [n, V] of the candidate, targets [n] -> n scores."""
    log_q = torch.log_softmax(logits_q.float(), dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    pick, top_p, top_q = targets[:, None], log_p.argmax(-1), log_q.argmax(-1)
    return Scores(
        -log_p.gather(1, pick)[:, 0].double().numpy(),
        -log_q.gather(1, pick)[:, 0].double().numpy(),
        kl.double().numpy(),
        (top_p == top_q).numpy(),
        (top_p == targets).numpy(),
        (top_q == targets).numpy(),
    )


def summarize(scores: Scores) -> dict[MetricName, float]:
    """Metric name -> value; NaN or infinite where the logits of some position are."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            "perplexity_ratio": float(np.exp(scores.nll_candidate.mean() - scores.nll_baseline.mean())),
            "kl_divergence_mean": float(scores.kl_divergence.mean()),
            "kl_divergence_p99": float(np.percentile(scores.kl_divergence, 99)),
            "top1_agreement": float(scores.same_top1.mean()),
        }


def perplexity_ratio(windows: Sequence[Scores]) -> Statistic:
    change = [scores.nll_candidate - scores.nll_baseline for scores in windows]
    return statistics.exp(_mean(change))


STATISTICS: dict[MetricName, Callable[[Sequence[Scores]], Statistic]] = {
    "perplexity_ratio": perplexity_ratio,
    "kl_divergence_mean": lambda windows: _mean([scores.kl_divergence for scores in windows]),
    "kl_divergence_p99": lambda windows: statistics.percentile([scores.kl_divergence for scores in windows], 99),
    "top1_agreement": lambda windows: _mean([scores.same_top1 for scores in windows]),
}


def _mean(values: Sequence[Array]) -> Statistic:
    """Over all positions of the windows."""
    return statistics.ratio(np.array([v.sum(dtype=float) for v in values]), np.array([len(v) for v in values]))
