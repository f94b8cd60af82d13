"""Bytes and cost of `compress apply` on 1, 2 and 3 threads: `python benchmarks/threads.py --recipe int4-gptq`.

`--model` and `--set` are those of `compress apply`; check and exports are off. Numbers of threads alternate, each run in a
process of its own with an empty cache; seconds are medians. Where other work shares the cores, trust the processor time.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe_machine

THREADS = (1, 2, 3)


def run(recipe: str, model: str | None, overrides: list[str], threads: int, folder: Path) -> tuple[float, float, str]:
    """Wall and processor seconds of one run, and the digest of all its shards."""
    command = [sys.executable, "-m", "cli", "apply", recipe, "-o", folder / "out"]
    for override in ["check=null", "export=[]", *overrides]:
        command += ["--set", override]
    command += ["-m", model] if model else []
    settings = {"OMP_NUM_THREADS": str(threads), "COMPRESS_CACHE": str(folder / "cache")}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, env=os.environ | settings, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    digest = hashlib.sha256()
    for shard in sorted((folder / "out" / "checkpoint").glob("*.safetensors")):
        digest.update(shard.read_bytes())
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - began, used, digest.hexdigest()


def measure(recipe: str, model: str | None, overrides: list[str], runs: int) -> dict:
    found = {threads: [] for threads in THREADS}
    for _ in range(runs):
        for threads in THREADS:
            with tempfile.TemporaryDirectory() as folder:
                found[threads].append(run(recipe, model, overrides, threads, Path(folder)))
    return {
        threads: {
            "wall_seconds": statistics.median(wall for wall, _, _ in each),
            "processor_seconds": statistics.median(used for _, used, _ in each),
            "sha256": sorted({digest for _, _, digest in each}),
        }
        for threads, each in found.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="int4-gptq")
    parser.add_argument("-m", "--model")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    figures = measure(arguments.recipe, arguments.model, arguments.overrides, arguments.runs)
    print(json.dumps({"machine": describe_machine(), "recipe": arguments.recipe, "threads": figures}, indent=2))
