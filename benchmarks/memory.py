"""Time and peak memory of `compress apply` on a large random checkpoint: `python benchmarks/memory.py [--shape SHAPE]`.

`--recipe` and `--set` (as of `compress apply`) choose what is done; the check is always off.

Runs the installed command in a process of its own under /usr/bin/time -v, so the peak is the kernel's figure.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from machine import describe_machine
from shapes import SHAPES, make


def measure(source: Path, out: Path, recipe: str, overrides: list[str]) -> dict:
    """Runs a recipe on `source`, check off, and returns what time and the report say."""
    command = [sys.executable, "-m", "cli", "apply", recipe, "-m", source, "-o", out, "--overwrite"]
    for override in ["check=null", *overrides]:
        command += ["--set", override]
    taken = timed(command)
    report = json.loads((out / "report.json").read_text())
    return {
        "recipe": [recipe, *overrides],
        **taken,
        "reported_peak_gib": report["passes"][0]["peak_rss_bytes"] / 2**30,
        "pass_seconds": report["passes"][0]["seconds"],
        "calibration": report.get("calibration"),
        "baseline_bytes": report["size"]["baseline_bytes"],
        "artifacts": {a["kind"]: a["bytes"] for a in report["artifacts"]},
    }


def timed(command: list, most_bytes: int | None = None) -> dict:
    """Runs a command, under a cap on what it may allocate (`ulimit -d`) where one is given: time and peak memory."""
    cap = partial(resource.setrlimit, resource.RLIMIT_DATA, (most_bytes, most_bytes)) if most_bytes else None
    run = subprocess.run(
        ["/usr/bin/time", "-v", *map(str, command)], capture_output=True, text=True, check=False, preexec_fn=cap
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return {
        "seconds": _elapsed(run.stderr),
        "processor_seconds": float(re.search(r"User time \(seconds\): ([\d.]+)", run.stderr)[1]),
        "peak_rss_gib": int(re.search(r"Maximum resident set size \(kbytes\): (\d+)", run.stderr)[1]) / 2**20,
    }


def _elapsed(text: str) -> float:
    """Seconds from time's h:mm:ss or m:ss.ss."""
    parts = re.search(r"Elapsed \(wall clock\) time .*: ([\d:.]+)", text)[1].split(":")
    return sum(float(part) * 60**i for i, part in enumerate(reversed(parts)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="jamba-reasoning-3b")
    parser.add_argument("--recipe", default="tiny-int8")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument(
        "--folder", type=Path, help="Where to keep the checkpoint and the output; default a temporary folder."
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        result = measure(
            make(arguments.shape, folder / arguments.shape), folder / "out", arguments.recipe, arguments.overrides
        )
    print(json.dumps({"machine": describe_machine(), "shape": arguments.shape, **result}, indent=2))
