"""What the gate can tell, from windows that were scored once: `python benchmarks/gate_power.py resolve|seeds FOLDER -m MODEL`.

`resolve`: how many tokens show a change of perplexity. Candidates are the original with some roles rounded to nearest, chosen so
that their perplexity changes by about 0.5, 1 and 2 %. Their paired differences of log-probabilities predict the tokens it takes,
n = ((1.96 + 0.84) sd / delta)^2 with the standard deviation that windows have, and checks of windows drawn anew count how often
the 95 % interval leaves 1 out.

`seeds`: the verdict of default limits on every FOLDER/NAME.npz of benchmarks/candidate_scores.py, for checks whose windows are
drawn anew, as many from each prompt set as shipped recipes use.
"""

import argparse
from pathlib import Path

import numpy as np
from candidate_scores import read
from default_limits import changed, rounded
from window_pool import Pool

from compress.check import figures
from compress.check.metrics import Scores
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.runtime.candidates import CheckpointCandidate

CUT = 64  # positions of the pieces that are drawn: a change of 2 % takes less than a few windows of 512
CHECKS = 200
SURE, LIKELY = 1.96, 0.84  # two-sided 95 %, 80 %
DAMAGES: dict[str, tuple[tuple[Role, str], ...]] = {
    "attention_qkv int4-g32": ((Role.ATTENTION_QKV, "int4-g32"),),
    "mlp int4-g32": ((Role.MLP, "int4-g32"),),
    "experts int4-g32": ((Role.EXPERTS, "int4-g32"),),
    "mlp and ssm_in int4-g32": ((Role.MLP, "int4-g32"), (Role.SSM_IN, "int4-g32")),
    "mlp, ssm_in, experts int4-g32": tuple((role, "int4-g32") for role in (Role.MLP, Role.SSM_IN, Role.EXPERTS)),
}


def damaged(model: HybridModel, roles: tuple[tuple[Role, str], ...]) -> HybridModel:
    for role, number_format in roles:
        model = changed(model, rounded(role, number_format))
    return model


def pieces(windows: list[Scores]) -> list[Scores]:
    """Windows cut into shorter ones."""
    return [
        Scores(*(getattr(window, name)[start : start + CUT] for name in Scores.__dataclass_fields__))
        for window in windows
        for start in range(0, len(window.kl_divergence) - CUT + 1, CUT)
    ]


def differences(windows: list[Scores]) -> np.ndarray:
    """Mean of -log q + log p of each window, nats."""
    return np.array([float((window.nll_candidate - window.nll_baseline).mean()) for window in windows])


def predicted_tokens(windows: list[Scores]) -> float:
    found = differences(windows)
    return CUT * ((SURE + LIKELY) * found.std(ddof=1) / found.mean()) ** 2


def power(windows: list[Scores], tokens: float, rng: np.random.Generator) -> float:
    """The share of checks of so many tokens whose interval shows that the perplexity changed."""
    count, shown = max(2, round(tokens / CUT)), 0
    for _ in range(CHECKS):
        drawn = [windows[i] for i in rng.integers(len(windows), size=count)]
        low, high = figures.of("perplexity_ratio", [drawn]).interval or (1.0, 1.0)
        shown += not low <= 1 <= high
    return shown / CHECKS


def resolve(model: Path) -> None:
    pool, rng = Pool(model, "odd", 20, 6), np.random.default_rng(0)
    print("| candidate | mean KL | perplexity | sd of a token | tokens, predicted | shown at that many | at twice as many |")
    print("|---|---|---|---|---|---|---|")
    for name, roles in DAMAGES.items():
        windows = pieces(pool.scores(CheckpointCandidate(damaged(pool.checkpoint.model, roles))))
        found, tokens = differences(windows), predicted_tokens(windows)
        kl = float(np.mean([window.kl_divergence.mean() for window in windows]))
        shown = [power(windows, times * tokens, rng) for times in (1, 2)]
        deviation = found.std(ddof=1) * CUT**0.5
        print(
            f"| {name} | {kl:.4f} | {100 * np.expm1(found.mean()):+.2f} % | {deviation:.3f} | {tokens:,.0f} "
            f"| {shown[0]:.0%} | {shown[1]:.0%} |", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("resolve", "seeds"))
    parser.add_argument("-m", "--model", type=Path, required=True)
    arguments = parser.parse_args()
    resolve(arguments.model)


if __name__ == "__main__":
    main()
