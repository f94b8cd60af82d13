"""SIGTERM and SIGHUP end a command as Ctrl-C does: whatever is being written is cleaned up, the rest can be resumed."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGHUP)
TOGETHER = 2.0  # seconds in which a second signal adds nothing: a closing terminal or a supervisor sends several


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop."""

    def __init__(self, number: int):
        super().__init__(number)
        self.name, self.exit_code = signal.Signals(number).name, 128 + number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Raises `Stopped` for them in the main thread; one that is ignored (nohup), or that a program handles, stays as it is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in STOPPING if signal.getsignal(number) is signal.SIG_DFL]
    last = -TOGETHER

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= TOGETHER:
            raise Stopped(number)

    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
