"""How much memory this process may have: of the machine, of the control groups it is in (as in a container), by its ulimits."""

import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from compress.errors import InputError

GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Files:
    """What a version of control groups calls the files of a group, and the pages of files that are dropped when room is needed."""

    limit: str
    used: str
    cached: tuple[str, ...]


SECOND = _Files("memory.max", "memory.current", ("inactive_file", "active_file"))
FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def available() -> int:
    """Bytes it may still take."""
    used = psutil.Process().memory_info()
    ulimits = [limit - taken for limit, taken in ((_ulimit("AS"), used.vms), (_ulimit("DATA"), used.data)) if limit]
    groups = (limit - taken for limit, taken in _groups())
    return max(0, min([psutil.virtual_memory().available, *ulimits, *groups]))


def refuse_beyond(path: Path, needed: float) -> None:
    """Raises InputError where an artifact needs more memory than is available."""
    free = available()
    if needed > free:
        raise InputError(
            f"{path}: needs about {needed / 2**30:.1f} GiB of memory to run, {free / 2**30:.1f} GiB are free"
        )


def total() -> int:
    """Bytes it may have in all."""
    ulimits = filter(None, (_ulimit("AS"), _ulimit("DATA")))
    return min([psutil.virtual_memory().total, *ulimits, *(limit for limit, _ in _groups())])


def _ulimit(name: str) -> int | None:
    soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
    return None if soft == resource.RLIM_INFINITY else soft


def _groups() -> Iterator[tuple[int, int]]:
    """Limit and use of every group with a limit that this process is in, the ones around it included."""
    for folder, files in _folders():
        limit, used = _number(folder / files.limit), _number(folder / files.used)
        if limit is not None and used is not None:
            yield limit, used - _cached(folder / "memory.stat", files.cached)


def _folders() -> Iterator[tuple[Path, _Files]]:
    """A container may see its own group under another path than the kernel names: as the outermost one that is there."""
    for line in _lines(GROUPS_OF_PROCESS):
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            root, files = (GROUPS / "memory", FIRST) if controllers else (GROUPS, SECOND)
            inner = root / path.lstrip("/")
            yield from ((folder, files) for folder in (inner, *inner.parents) if folder.is_relative_to(root))


def _number(path: Path) -> int | None:
    """None where there is no limit ("max"), or no such file."""
    text = next(iter(_lines(path)), "")
    return int(text) if text.isdigit() else None


def _cached(path: Path, names: tuple[str, ...]) -> int:
    pairs = (line.split() for line in _lines(path))
    return sum(int(pair[1]) for pair in pairs if pair[0] in names)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
