"""What is compared at every scored position, and the metrics over them.

At each position the baseline gives a distribution p over the vocabulary, the candidate q, and the text a next token y:

    KL(p || q) = sum_v p_v (log p_v - log q_v)          nats
    perplexity = exp(mean of -log q_y)                   ratio: candidate / baseline
    top-1      = argmax p == argmax q

These are the figures of llama.cpp's `llama-perplexity --kl-divergence`, over the full vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch

from compress.recipe.check import MetricName


@dataclass
class Scores:
    """One value per scored position."""

    nll_baseline: np.ndarray  # -log p_y, nats
    nll_candidate: np.ndarray  # -log q_y, nats
    kl_divergence: np.ndarray  # nats
    same_top1: np.ndarray  # bool

    @staticmethod
    def concatenate(parts: list["Scores"]) -> "Scores":
        return Scores(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in Scores.__dataclass_fields__)
        )


def score(log_p: torch.Tensor, logits_q: torch.Tensor, targets: torch.Tensor) -> Scores:
    """log_p [n, V] log-probabilities of the baseline, logits_q [n, V] of the candidate, targets [n] -> n scores."""
    log_q = torch.log_softmax(logits_q.float(), dim=-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    pick = targets[:, None]
    return Scores(
        -log_p.gather(1, pick)[:, 0].double().numpy(),
        -log_q.gather(1, pick)[:, 0].double().numpy(),
        kl.double().numpy(),
        (log_p.argmax(-1) == log_q.argmax(-1)).numpy(),
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
