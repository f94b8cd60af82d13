"""Round to nearest int8 beside the speed of the disk: `python benchmarks/rounding_speed.py FOLDER [--shape SHAPE] [--repeats N]`.

Alternates, in one run and with the source out of the page cache each time: reading the checkpoint and writing as many
bytes as the result has, with fsync; and the sweep of `compress apply` with a recipe without export and check, from its
first read to the last fsync of the checkpoint (start-up and the hash of the source, which would warm the cache, apart).
What counts is the ratio of the medians.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

from machine import describe_machine
from shapes import SHAPES, make

from compress.apply import pipeline, sweep
from compress.output_folder.workspace import Workspace
from compress.passes import PassContext
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

RECIPE = "version: 1\npasses:\n  - quantize: {method: rtn, weights: int8}\n"
CHUNK = 16 << 20


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def disk_seconds(source: Path, target: Path, size: int) -> float:
    """Reads every weight file of `source`, then writes `size` bytes to `target` with fsync."""
    began, buffer = time.monotonic(), bytearray(CHUNK)
    for path in sorted(source.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with open(target, "wb", buffering=0) as file:
        for start in range(0, size, CHUNK):
            file.write(buffer[: min(CHUNK, size - start)])
        os.fsync(file.fileno())
    seconds = time.monotonic() - began
    target.unlink()
    return seconds


def sweep_seconds(source: Path, folder: Path) -> tuple[float, int, float]:
    """Seconds of the sweep, bytes written, peak memory in GiB."""
    recipe = folder / "rounding.yaml"
    recipe.write_text(RECIPE)
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(source)), folder / "rounding")
    planned = pipeline.prepare(job)
    with Workspace(job.out, resume=False, overwrite=True) as space:
        space.begin({})
        forget(source)
        swept = sweep.run(planned, PassContext(job.device, job.seed), space, None)
        size = sum(path.stat().st_size for path in (space.folder / sweep.CHECKPOINT).iterdir())
        space.discard()
    return swept.seconds, size, swept.peak_rss_bytes / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="Where the checkpoint is (or will be) and the result goes: one disk.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="moe-1.6b")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    source = make(arguments.shape, arguments.folder / arguments.shape)
    disk, sweeps, size, peak = [], [], None, 0.0
    for _ in range(arguments.repeats):
        seconds, size, peak = sweep_seconds(source, arguments.folder)
        sweeps.append(seconds)
        forget(source)
        disk.append(disk_seconds(source, arguments.folder / "written.bin", size))
    ratio = statistics.median(disk) / statistics.median(sweeps)
    found = {"disk_seconds": disk, "sweep_seconds": sweeps, "bytes_written": size, "peak_rss_gib": peak}
    print(json.dumps({"machine": describe_machine(), **found, "speed_of_the_disk": ratio}, indent=2))


if __name__ == "__main__":
    main()
