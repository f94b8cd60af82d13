"""Many names of tensors in short: `model.layers.[0-2,5].mamba.in_proj.weight` is four."""

import math
import re
from collections.abc import Iterable
from itertools import product

MOST_NAMES = 1_000_000  # of all models there are, with room; keeps a corrupt file from filling memory
NUMBERS = re.compile(r"\[(\d{1,6}(?:-\d{1,6})?(?:,\d{1,6}(?:-\d{1,6})?)*)\]", re.ASCII)
Parts = tuple[str, ...]


def in_short(names: Iterable[str]) -> tuple[str, ...]:
    """Names that differ in numbers alone become one; `written_out` has the same ones, in another order."""
    found: dict[Parts, None] = {tuple(name.split(".")): None for name in names}
    for at in reversed(range(max(map(len, found), default=0))):
        found = _joined_at(found, at)
    return tuple(".".join(parts) for parts in found)


def _joined_at(found: Iterable[Parts], at: int) -> dict[Parts, None]:
    """Names that are equal but for a number there, as one each."""
    groups: dict[tuple[Parts, Parts], list[int]] = {}
    others: dict[Parts, None] = {}
    for parts in found:
        if at < len(parts) and _is_number(parts[at]):
            groups.setdefault((parts[:at], parts[at + 1 :]), []).append(int(parts[at]))
        else:
            others[parts] = None
    return others | {
        (*before, _ranges(sorted(set(numbers))), *after): None for (before, after), numbers in groups.items()
    }


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _ranges(numbers: list[int]) -> str:
    """`[0-2,5]` of 0, 1, 2, 5; a single number as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"[{','.join(str(run[0]) if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)}]"


def written_out(patterns: Iterable[str]) -> list[str]:
    """Every name; raises ValueError for what is not written so, and for more names than any model has."""
    names: list[str] = []
    for pattern in patterns:
        alternatives = [_alternatives(part, pattern) for part in pattern.split(".")]
        if len(names) + math.prod(map(len, alternatives)) > MOST_NAMES:
            raise ValueError(f"'{pattern:.80}' names more tensors than any model has")
        names += map(".".join, product(*alternatives))
    return names


def _alternatives(part: str, pattern: str) -> list[str]:
    if "[" not in part and "]" not in part:
        return [part]
    found = NUMBERS.fullmatch(part)
    runs = [_run(run) for run in found[1].split(",")] if found else []
    if not runs or not all(runs):
        raise ValueError(f"'{pattern:.80}' is no name of tensors: expected numbers as in layers.[0-2,5]")
    return [str(number) for run in runs for number in run]


def _run(run: str) -> range:
    first, _, last = run.partition("-")
    return range(int(first), int(last or first) + 1)
