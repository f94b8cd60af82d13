"""`compress check` on a random checkpoint larger than the memory it may have: `python benchmarks/check_memory.py [--share 0.6]`.

The original is checked against its int8 checkpoint, both phases, first as it is, then where it may allocate no more than a
share of the original's bytes (`ulimit -d`: of private memory, mapped files not counted). Each begins with an empty cache.
Prints time, peak memory and what lay on disk, and whether both gave the same figures.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from machine import describe_machine
from memory import timed
from shapes import SHAPES, make

COMPRESS = [sys.executable, "-m", "cli"]


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checked(original: Path, candidate: Path, work: Path, prompts: list[str], most_bytes: int | None) -> dict:
    """One check with a cache of its own: what it took, and its rows."""
    cache, rows = Path(tempfile.mkdtemp(dir=work)), work / "rows.json"
    os.environ["COMPRESS_CACHE"] = str(cache)
    taken = timed([*COMPRESS, "check", original, candidate, *prompts, "--json", rows], most_bytes)
    return {**taken, "cached_bytes": bytes_below(cache), "checks": json.loads(rows.read_text())["checks"]}


def compared(original: Path, work: Path, share: float, prompts: list[str]) -> dict:
    candidate, size = work / "out", bytes_below(original)
    overrides = [part for key in ("check=null", "export=[]") for part in ("--set", key)]
    timed([*COMPRESS, "apply", "tiny-int8", "-m", original, "-o", candidate, "--overwrite", *overrides])
    free = checked(original, candidate / "checkpoint", work, prompts, None)
    capped = checked(original, candidate / "checkpoint", work, prompts, int(share * size))
    agree = free.pop("checks") == capped.pop("checks")
    return {
        "original_bytes": size, "candidate_bytes": bytes_below(candidate / "checkpoint"), "cap_bytes": int(share * size),
        "free": free, "capped": capped, "same_figures": agree,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="moe-0.8b")
    parser.add_argument("--share", type=float, default=0.6, help="Of the original's bytes that may be allocated.")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="Where the checkpoint is kept; default a temporary folder.")
    arguments = parser.parse_args()
    asked = ["--prompts", "heldout", "--samples", str(arguments.samples), "--length", str(arguments.length)]
    with tempfile.TemporaryDirectory() as temporary:
        kept = (arguments.folder or Path(temporary)) / arguments.shape
        found = compared(make(arguments.shape, kept), Path(temporary), arguments.share, asked)
    print(json.dumps({"machine": describe_machine(), "shape": arguments.shape, "asked": asked, **found}, indent=2))
