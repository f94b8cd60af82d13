"""What is compared at every scored position, and the metrics over them.

At each position the baseline gives a distribution p over the vocabulary, the candidate q, and the text a next token y:

    KL(p || q) = sum_v p_v (log p_v - log q_v)          nats
    perplexity = exp(mean of -log q_y)                   ratio: candidate / baseline
    top-1      = argmax p == argmax q

These are the figures of llama.cpp's `llama-perplexity --kl-divergence`, over the full vocabulary. Each is a statistic of the
windows (`STATISTICS`), which tells its value and its interval.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from compress.check import statistics
from compress.check.statistics import Array, Statistic
from compress.recipe.check import MetricName

ENTRIES = 1 << 17  # of [positions, V] looked at together: several times as many fit into a processor's cache


@dataclass
class Scores:
    """One value per scored position."""

    nll_baseline: np.ndarray  # -log p_y, nats
    nll_candidate: np.ndarray  # -log q_y, nats
    kl_divergence: np.ndarray  # KL(p || q), nats
    kl_reverse: np.ndarray  # KL(q || p), nats
    same_top1: np.ndarray  # bool
    baseline_right: np.ndarray  # bool, argmax p == y
    candidate_right: np.ndarray  # bool, argmax q == y

    def __len__(self) -> int:
        return len(self.kl_divergence)

    @staticmethod
    def concatenate(parts: list["Scores"]) -> "Scores":
        return Scores(*(np.concatenate([getattr(part, of.name) for part in parts]) for of in fields(Scores)))


@dataclass(frozen=True)
class WindowScores:
    """Of consecutive positions of one window, the first of which is its token `first`."""

    first: int
    scores: Scores

    @property
    def tokens(self) -> int:
        """Of the window, those before the first position included."""
        return self.first + len(self.scores)

    def between(self, first: int, last: float) -> Scores:
        """Of the tokens `first` to `last`, both included, as far as they were scored."""
        places = np.arange(self.first, self.tokens)
        inside = (first <= places) & (places <= last)
        return Scores(*(getattr(self.scores, of.name)[inside] for of in fields(Scores)))


def score(log_p: torch.Tensor, logits_q: torch.Tensor, targets: torch.Tensor) -> Scores:
    """log_p [n, V] log-probabilities of the baseline, logits_q [n, V] of the candidate, targets [n] -> n scores."""
    rows = max(1, ENTRIES // log_p.shape[1])
    if len(log_p) <= rows:
        return _score(log_p, logits_q, targets)
    parts = zip(log_p.split(rows), logits_q.split(rows), targets.split(rows), strict=True)
    return Scores.concatenate([_score(*part) for part in parts])


def _score(log_p: torch.Tensor, logits_q: torch.Tensor, targets: torch.Tensor) -> Scores:
    log_q = torch.log_softmax(logits_q.float(), dim=-1)
    best_p, best_q, pick = log_p.argmax(-1), log_q.argmax(-1), targets[:, None]
    forward, reverse = _divergences(log_p, log_q)
    return Scores(
        -log_p.gather(1, pick)[:, 0].double().numpy(),
        -log_q.gather(1, pick)[:, 0].double().numpy(),
        forward,
        reverse,
        (best_p == best_q).numpy(),
        (best_p == targets).numpy(),
        (best_q == targets).numpy(),
    )


def _divergences(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """KL(p || q) and KL(q || p) of each row, the first as the sum of p change - p + q with change = log p - log q: p and q sum
    to 1 each, and so no term is below 0, whatever float32 makes of them. Where p and q are near, terms of that size cancel
    but for expm1. Both directions together are the sum of (p - q) change."""
    p, q, change = log_p.exp(), log_q.exp(), log_p - log_q
    terms = torch.where(change.abs() < 0.5, p * (torch.expm1(-change) + change), p * change - p + q)
    forward, both = terms.sum(-1), ((p - q) * change).sum(-1)
    return forward.clamp(min=0).double().numpy(), (both - forward).clamp(min=0).double().numpy()


def summarize(scores: Scores) -> dict[MetricName, float]:
    """Metric name -> value; NaN or infinite where the logits of some position are."""
    return {metric: statistics.value(statistic_of([scores]), 1) for metric, statistic_of in STATISTICS.items()}


def perplexity_ratio(windows: Sequence[Scores]) -> Statistic:
    return statistics.exp(_mean([scores.nll_candidate - scores.nll_baseline for scores in windows]))


def root_mean_square(windows: Sequence[Array]) -> Statistic:
    """Over all positions of the windows."""
    return statistics.root(_mean([values**2 for values in windows]))


def _divergence_percentile(percent: float) -> Callable[[Sequence[Scores]], Statistic]:
    return lambda windows: statistics.percentile([scores.kl_divergence for scores in windows], percent)


def _divergence_mean(windows: Sequence[Scores]) -> Statistic:
    return _mean([scores.kl_divergence for scores in windows])


def _mean(values: Sequence[Array]) -> Statistic:
    """Over all positions of the windows."""
    return statistics.ratio(np.array([v.sum(dtype=float) for v in values]), np.array([len(v) for v in values]))


STATISTICS: dict[MetricName, Callable[[Sequence[Scores]], Statistic]] = {
    "perplexity_ratio": perplexity_ratio,
    "kl_divergence_mean": _divergence_mean,
    "kl_divergence_reverse_mean": lambda windows: _mean([scores.kl_reverse for scores in windows]),
    "kl_divergence_p50": _divergence_percentile(50),
    "kl_divergence_p95": _divergence_percentile(95),
    "kl_divergence_p99": _divergence_percentile(99),
    "kl_divergence_p999": _divergence_percentile(99.9),
    "kl_divergence_tail_ratio": lambda windows: statistics.share(
        _divergence_percentile(99)(windows), _divergence_mean(windows)
    ),
    "top1_agreement": lambda windows: _mean([scores.same_top1 for scores in windows]),
    "top1_accuracy_drop": lambda windows: _mean(
        [scores.baseline_right.astype(int) - scores.candidate_right for scores in windows]
    ),
}
