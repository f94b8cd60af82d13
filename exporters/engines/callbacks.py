"""What a builder calls back: its log, its progress, and where it writes.

They inherit from classes of a library that is loaded late, so each is made by a function that is given the library.
"""

import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import BinaryIO, Protocol

NO_DRIVER = "cudaError 35"  # which builders that need no GPU report as an error, and go on
EXCLUDED = re.compile(r"not be able to run on target\(s\): ([\w, ]+?), because")
TAKEN = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")
LEAST_STEP = 0.01  # of progress that is told


class Severity(Protocol):
    name: str


class Heard:
    """What a log is read for: errors, the `bytes` of weights and activations that an engine takes, and the GPUs it is `not_for`, of
    those it would be for."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.bytes: dict[str, int] = {}
        self.not_for: set[str] = set()

    def log(self, severity: Severity, message: str) -> None:
        """Prints all but what is verbose, of which a small model has megabytes."""
        if excluded := EXCLUDED.search(message):
            self.not_for.update(excluded[1].split(", "))
        if severity.name == "VERBOSE":
            return
        print(f"{severity.name}: {message}", file=sys.stderr)
        if severity.name in ("ERROR", "INTERNAL_ERROR") and NO_DRIVER not in message:
            self.errors.append(message)
        elif found := TAKEN.search(message):  # once for each profile
            self.bytes[found[1]] = max(int(found[2]), self.bytes.get(found[1], 0))


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """Phases within phases, each with so many steps, as one share that only grows. Called from several threads."""

    def __init__(self, tell: Callable[[float], None]):
        self._tell, self._told, self._lock = tell, 0.0, threading.Lock()
        self._phases: dict[str, _Phase] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[phase] = _Phase(parent, max(1, steps))

    def step(self, phase: str, step: int) -> bool:
        """Whether to go on."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase].done = step + 1
                share = self._share(phase)
                if share >= self._told + LEAST_STEP:
                    self._told = share
                    self._tell(share)
        return True

    def _share(self, name: str) -> float:
        """Of the whole, where every step of a phase counts alike."""
        share, phase = 0.0, self._phases.get(name)
        while phase is not None:
            share = min(1.0, (phase.done + share) / phase.steps)
            phase = None if phase.parent is None else self._phases.get(phase.parent)
        return share


def logger(trt: ModuleType, heard: Heard) -> object:
    return _made(trt.ILogger, log=lambda self, severity, message: heard.log(severity, message))


def monitor(trt: ModuleType, progress: Progress) -> object:
    return _made(
        trt.IProgressMonitor,
        phase_start=lambda self, phase, parent, steps: progress.start(phase, parent, steps),
        step_complete=lambda self, phase, step: progress.step(phase, step),
        phase_finish=lambda self, phase: None,
    )


def writer(trt: ModuleType, file: BinaryIO) -> object:
    return _made(trt.IStreamWriter, write=lambda self, data: file.write(data))


def _made(base: type, **methods: Callable[..., object]) -> object:
    return type(base.__name__, (base,), methods)()
