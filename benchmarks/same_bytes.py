"""Proves that a change moved no byte: `python benchmarks/same_bytes.py BEFORE AFTER`, two checkouts of this project.

Every shipped recipe of BEFORE, check off, on the reference model and on the tied random Jamba of the tests: `apply` of one
checkout and of the other by turns, each run in a process of its own with an empty cache. Shards and model.onnx.data must
be the same in all runs, else the exit code is 1; model.onnx and config.json are noted. Seconds are the least of the
`--repeats`; where other work shares the cores, trust the processor time. `--set` is that of `compress apply`;
OMP_NUM_THREADS, where set, goes for both.
"""

import argparse
import compileall
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from machine import describe_machine

FILES = {"shards": "checkpoint/*.safetensors", "model.onnx.data": "onnx/model.onnx.data", "model.onnx": "onnx/model.onnx",
         "config.json": "checkpoint/config.json"}  # fmt: skip
TIMES = [f"{clock} {side}" for clock in ("wall", "processor") for side in ("before, s", "after, s", "ratio")]
REFUSED = 2  # exit code of `apply` where a recipe does not fit a model


@dataclass(frozen=True)
class Run:
    """One `apply`. `digests`: column of the table -> {(file name, sha256)}."""

    exit_code: int
    digests: dict[str, set[tuple[str, str]]]
    seconds: tuple[float, float]  # wall, processor


def tied_jamba(folder: Path, tiny: Path) -> Path:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    from jamba_models import TIED, make_whole_model

    return make_whole_model(folder, tiny, **TIED)


def digests(out: Path, pattern: str) -> set[tuple[str, str]]:
    return {(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in out.glob(pattern)}


def apply(checkout: Path, recipe: Path, model: Path, overrides: list[str]) -> Run:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, checkout / "cli.py", "apply", recipe, "-m", model, "-o", folder / "out"]
        command += [part for override in ["check=null", *overrides] for part in ("--set", override)]
        environment = os.environ | {"PYTHONPATH": str(checkout), "COMPRESS_CACHE": str(folder / "cache")}
        used, began = sum(os.times()[2:4]), time.monotonic()  # [2:4]: processor time of ended children
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        seconds = time.monotonic() - began, sum(os.times()[2:4]) - used
        if done.returncode:
            print(f"{checkout}, {recipe.stem}, {model.name}: {done.stderr.strip()}", file=sys.stderr)
        found = {column: digests(folder / "out", pattern) for column, pattern in FILES.items()}
        return Run(done.returncode, found, seconds)


def compare(checkouts: list[Path], recipe: Path, model: Path, overrides: list[str], repeats: int) -> list[list[Run]]:
    """Runs of each checkout; the one that goes first changes from repeat to repeat."""
    sides: list[list[Run]] = [[], []]
    for repeat in range(repeats):
        for side in (0, 1) if repeat % 2 == 0 else (1, 0):
            sides[side].append(apply(checkouts[side], recipe, model, overrides))
    return sides


def verdict(runs: list[Run], column: str) -> str:
    """Whether the files of a column have the same names and bytes in all runs, and which do not."""
    found = [run.digests[column] for run in runs]
    if moved := set.union(*found) - set.intersection(*found):
        return "DIFFERS: " + ", ".join(sorted({name for name, _ in moved}))
    return f"same ({len(found[0])})" if found[0] else "none"


def times(sides: list[list[Run]]) -> list[float]:
    """Least wall seconds before and after, then least processor seconds; zeros where a run failed."""
    if any(run.exit_code for runs in sides for run in runs):
        return [0.0] * 4
    return [min(run.seconds[clock] for run in runs) for clock in (0, 1) for runs in sides]


def cells(seconds: list[float]) -> list[str]:
    pairs = zip(seconds[::2], seconds[1::2], strict=True)
    return [cell for old, new in pairs for cell in (f"{old:.1f}", f"{new:.1f}", f"{new / old:.3f}" if old else "")]


def judge(sides: list[list[Run]]) -> tuple[bool, list[str]]:
    """Whether all runs wrote the same bytes, or all refused (a crash on both sides proves nothing); the table's cells."""
    codes = [sorted({run.exit_code for run in runs}) for runs in sides]
    if codes != [[0], [0]]:
        said = "exit code {} before, {} after".format(*(", ".join(map(str, each)) for each in codes))
        return codes == [[REFUSED]] * 2, [said, *[""] * (len(FILES) + len(TIMES) - 1)]
    said = {column: verdict(sides[0] + sides[1], column) for column in FILES}
    same = said["shards"].startswith("same") and not said["model.onnx.data"].startswith("DIFFERS")
    return same, [*said.values(), *cells(times(sides))]


def show(*row: str) -> None:
    print("| " + " | ".join(row) + " |", flush=True)


def table(options: argparse.Namespace, models: dict[str, Path], recipes: dict[str, Path]) -> bool:
    """Prints it; whether some recipe ran, and every row holds."""
    show("model", "recipe", *FILES, *TIMES)
    show(*["---"] * (2 + len(FILES) + len(TIMES)))
    held, total = True, [0.0] * 4
    for model, recipe in itertools.product(models, recipes):
        sides = compare(options.checkouts, recipes[recipe], models[model], options.overrides, options.repeats)
        same, row = judge(sides)
        show(model, f"`{recipe}`", *row)
        held = held and same
        total = [sum(pair) for pair in zip(total, times(sides), strict=True)]
    show("all", "", *[""] * len(FILES), *cells(total))
    return held and total[0] > 0


def checkout(name: str) -> Path:
    if not (Path(name) / "cli.py").is_file():
        raise argparse.ArgumentTypeError(f"{name} is no checkout: it has no cli.py")
    return Path(name).resolve()


def chosen(named: str | None, found: dict[str, Path], parser: argparse.ArgumentParser) -> dict[str, Path]:
    names = named.split(",") if named else sorted(found)
    found |= {name: Path(name).resolve() for name in names if (Path(name) / "config.json").is_file()}
    if unknown := set(names) - set(found):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(sorted(found))}")
    return {name: found[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", type=checkout, nargs=2, metavar="CHECKOUT", help="BEFORE, then AFTER.")
    parser.add_argument("--recipes", help="Names, with commas between; all where not given.")
    parser.add_argument("--models", help="tiny-jamba, tied-jamba, folders; the first two where not given.")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    before = options.checkouts[0]
    for folder in (path / package for path in options.checkouts for package in ("compress", "exporters")):
        compileall.compile_dir(folder, quiet=2)  # else the first run of a fresh checkout compiles in its own time
    with tempfile.TemporaryDirectory() as name:
        tiny = before / "models" / "tiny-jamba"
        made = {"tiny-jamba": tiny, "tied-jamba": tied_jamba(Path(name) / "tied-jamba", tiny)}
        recipes = chosen(options.recipes, {path.stem: path for path in before.glob("recipes/*.yaml")}, parser)
        held = table(options, chosen(options.models, made, parser), recipes)
    print(json.dumps({"machine": describe_machine(), "threads": os.environ.get("OMP_NUM_THREADS")}), file=sys.stderr)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
