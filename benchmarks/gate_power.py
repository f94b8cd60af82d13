"""What the gate can tell, from windows that were scored once: `python benchmarks/gate_power.py resolve|seeds FOLDER -m MODEL`.

`resolve`: how many tokens show a change of perplexity. Candidates are the original with some roles rounded to nearest, chosen so
that their perplexity changes by about 0.5, 1 and 2 %. Their paired differences of log-probabilities predict the tokens it takes,
n = ((1.96 + 0.84) sd / delta)^2 with the standard deviation that windows have, and checks of windows drawn anew count how often
the 95 % interval leaves 1 out.

`seeds`: the verdict of default limits on every FOLDER/NAME.npz of benchmarks/candidate_scores.py, for checks whose windows are
drawn anew, as many from each prompt set as shipped recipes use.
"""

import argparse
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from candidate_scores import read
from default_limits import changed, rounded
from window_pool import Pool

from compress.check import figures
from compress.check.compare import Found, Row, verdict
from compress.check.default_limits import limits
from compress.check.expected import expected
from compress.check.metrics import STATISTICS, Scores, root_mean_square
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.recipe.check import MetricName
from compress.runtime.artifacts import find_artifact, open_artifact
from compress.runtime.candidates import CheckpointCandidate

CUT = 64  # positions of the pieces that are drawn: a change of 2 % takes less than a few windows of 512
CHECKS = 200
SEEDS, DRAWN = 20, 24  # checks, and windows that each draws from each prompt set
SURE, LIKELY = 1.96, 0.84  # two-sided 95 %, 80 %
DAMAGES = tuple(  # roles in int4-g32
    map(tuple, (
        [Role.SSM_OUT], [Role.MLP], [Role.EXPERTS], [Role.ATTENTION_QKV], [Role.MLP, Role.SSM_IN],
        [Role.MLP, Role.SSM_IN, Role.EXPERTS], [Role.MLP, Role.SSM_IN, Role.SSM_OUT, Role.EXPERTS],
    ))
)  # fmt: skip


def damaged(model: HybridModel, roles: tuple[Role, ...]) -> HybridModel:
    for role in roles:
        model = changed(model, rounded(role, "int4-g32"))
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
    print(
        "| in int4-g32 | mean KL | perplexity | sd of a token | tokens, predicted | shown at that many | at twice as many |"
    )
    print("|---|---|---|---|---|---|---|")
    for roles in DAMAGES:
        windows = pieces(pool.scores(CheckpointCandidate(damaged(pool.checkpoint.model, roles))))
        found, tokens = differences(windows), predicted_tokens(windows)
        kl = float(np.mean([window.kl_divergence.mean() for window in windows]))
        shown = [power(windows, times * tokens, rng) for times in (1, 2)]
        deviation = found.std(ddof=1) * CUT**0.5
        print(
            f"| {', '.join(roles)} | {kl:.4f} | {100 * np.expm1(found.mean()):+.2f} % | {deviation:.3f} | {tokens:,.0f} "
            f"| {shown[0]:.0%} | {shown[1]:.0%} |", flush=True,
        )  # fmt: skip


def judged(sets: list[list[Scores]], decoded: list[list[Scores]], limits: dict[MetricName, float]) -> Found:
    """The rows of one check: both phases of the same windows."""
    found = Found()
    for phase, of_phase in (("prefill", sets), ("decode", decoded)):
        of_metric = {metric: figures.of(metric, of_phase) for metric in limits if metric in STATISTICS}
        if phase == "decode":
            moved = [b.nll_candidate - a.nll_candidate for a, b in zip(chain(*sets), chain(*decoded), strict=True)]
            strata, positions = [len(windows) for windows in sets], sum(map(len, moved))
            of_metric["decode_prefill_difference"] = figures.figure(root_mean_square(moved), strata, positions)
        for metric, figure in of_metric.items():
            low, high = figure.interval or (None, None)
            row = Row("", metric, phase, "all", figure.value, figure.positions, limits[metric], low, high)
            found.rows.append(row)
    return found


def seeds(model: Path, folder: Path, named: list[str]) -> None:
    print("| candidate | expected KL | measured | of 20 seeds pass | nearest to its limit |")
    print("|---|---|---|---|---|")
    original = open_artifact(model)
    for name, _, path in (word.partition("=") for word in named):
        costs = expected(original, open_artifact(find_artifact(Path(path))))
        windows, sizes = read(folder / f"{name}.npz")
        decoded = read(folder / f"{name}.npz", "decode")[0]
        verdicts, nearest, rng = Counter[str](), Counter[str](), np.random.default_rng(0)
        for _ in range(SEEDS):
            places = [
                rng.integers(size, size=DRAWN) + start
                for start, size in zip((0, sizes["heldout"]), sizes.values(), strict=True)
            ]
            found = judged(
                *([[of[i] for i in set_places] for set_places in places] for of in (windows, decoded)), limits(costs)
            )
            verdicts[verdict(found)] += 1
            nearest[max(found.rows, key=used).metric] += 1
        kl = float(np.concatenate([window.kl_divergence for window in windows]).mean())
        most = ", ".join(metric for metric, _ in nearest.most_common(2))
        print(f"| {name} | {costs.weights + costs.inputs:.2g} | {kl:.2g} | {dict(verdicts)} | {most} |", flush=True)


def used(row: Row) -> float:
    """How much of the way from an unchanged model to the limit the farther end of the interval is."""
    unchanged = {"perplexity_ratio": 1.0, "top1_agreement": 1.0}.get(row.metric, 0.0)
    ends = [row.value or 0.0, *(row.interval or ())]
    return max((end - unchanged) / ((row.limit or 0.0) - unchanged) for end in ends)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("resolve", "seeds"))
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("artifacts", nargs="*", metavar="NAME=ARTIFACT")
    parser.add_argument("-m", "--model", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.what == "resolve":
        resolve(arguments.model)
    else:
        seeds(arguments.model, arguments.folder, arguments.artifacts)


if __name__ == "__main__":
    main()
