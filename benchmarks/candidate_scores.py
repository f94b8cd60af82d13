"""Scores of candidates window by window: `python benchmarks/candidate_scores.py -m MODEL --half HALF --out FOLDER NAME=ARTIFACT...`

Each artifact is run over the windows of a half (benchmarks/window_pool.py) in one pass, with `--decode` token by token too, and
what it scores is kept as FOLDER/NAME.npz: an array of every kind for each window, in order. From these windows are drawn anew.
"""

import argparse
from pathlib import Path

import numpy as np
from window_pool import Pool, figures

from compress.check.metrics import Scores
from compress.runtime.artifacts import find_artifact, open_artifact

KINDS = tuple(Scores.__dataclass_fields__)


def kept(scores: list[Scores], phase: str) -> dict[str, np.ndarray]:
    """Arrays by name, with the lengths that cut them into windows."""
    whole = Scores.concatenate(scores)
    lengths = np.array([len(window.kl_divergence) for window in scores])
    return {f"{phase}_lengths": lengths} | {f"{phase}_{kind}": getattr(whole, kind) for kind in KINDS}


def read(file: Path, phase: str = "prefill") -> tuple[list[Scores], dict[str, int]]:
    """The windows of a candidate, and how many of them each prompt set has."""
    with np.load(file) as found:
        cuts = np.cumsum(found[f"{phase}_lengths"])[:-1]
        columns = [np.split(found[f"{phase}_{kind}"], cuts) for kind in KINDS]
        sizes = {name: int(found[f"set_{name}"]) for name in ("heldout", "self")}
    return [Scores(*row) for row in zip(*columns, strict=True)], sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--half", choices=("even", "odd"), default="odd")
    parser.add_argument("--heldout", type=int, default=20, help="Held-out windows, at most.")
    parser.add_argument("--sampled", type=int, default=6, help="Windows sampled with each of two seeds.")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("artifacts", nargs="+", metavar="NAME=ARTIFACT")
    arguments = parser.parse_args()
    pool = Pool(arguments.model, arguments.half, arguments.heldout, arguments.sampled)
    for named in arguments.artifacts:
        name, _, path = named.partition("=")
        candidate = open_artifact(find_artifact(Path(path))).candidate()
        found = {f"set_{prompts}": np.array(size) for prompts, size in pool.sizes.items()}
        for phase in ("prefill", "decode") if arguments.decode else ("prefill",):
            scores = pool.scores(candidate, phase)
            found |= kept(scores, phase)
            print(name, phase, figures(Scores.concatenate(scores)), flush=True)
        np.savez_compressed(arguments.out / f"{name}.npz", **found)


if __name__ == "__main__":
    main()
