"""Starts the process that builds, hears what it says, and ends it with us."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from exporters.engines import library
from exporters.engines.job import Answer, Job, Loaded

CHILD = "exporters.engines.child"


class _DiedError(Exception):
    """It ended without an answer: a library crashed, or the system killed it. The words follow `the builder`."""


def why_none() -> str | None:
    """A sentence on why no engine can be built here; None where one can."""
    found = _found()
    return found if isinstance(found, str) else None


def found() -> Loaded:
    """The builder, where there is one."""
    builder = _found()
    assert not isinstance(builder, str), builder
    return builder


@cache
def _found() -> Loaded | str:
    """Loading a builder takes a process and half a second."""
    if (missing := library.why_missing()) is not None:
        return missing
    try:
        answer = _asked(None, Path(os.devnull), lambda share: None)
    except _DiedError as died:
        return f"the builder that is installed {died}; {library.HOW_TO_BUILD}"
    if "loaded" in answer:
        return answer["loaded"]
    return answer["unusable"] if "unusable" in answer else f"{answer['failed']}; {library.HOW_TO_BUILD}"


def run(job: Job, log: Path, tell: Callable[[float], None]) -> Answer:
    """How a build ended; `tell` hears which share of it is done."""
    try:
        return _asked(job, log, tell)
    except _DiedError as died:
        return {"failed": f"the builder {died}"}


def _asked(job: Job | None, log: Path, tell: Callable[[float], None]) -> Answer:
    with _started(log) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            if not line.startswith("{"):  # what an environment prints wherever Python starts
                continue
            answer: Answer = json.loads(line)
            if "progress" not in answer:
                return answer
            tell(answer["progress"])
        raise _DiedError(_end(process.wait()))


@contextlib.contextmanager
def _started(log: Path) -> Iterator["subprocess.Popen[str]"]:
    """In a session of its own, so that Ctrl-C reaches it through us, who kill it whatever happens. It imports what we do, and
    nothing that happens to lie in the working folder."""
    known = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    with open(log, "ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD, str(log)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True, env={**os.environ, "PYTHONPATH": known}, start_new_session=True,
        )  # fmt: skip
    try:
        with process:
            try:
                yield process
            finally:
                process.kill()
    except BrokenPipeError:  # of its stdin, where it died before it read
        raise _DiedError(_end(process.wait())) from None


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (", as the system does where memory runs out" if name == "SIGKILL" else "")
