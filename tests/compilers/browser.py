"""Chromium without a window, spoken to over a pipe in the DevTools protocol: no package is needed for it."""

import base64
import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0  # seconds for an answer


class Browser:
    """One page. `events` are what it told unasked since the last visit: errors on its console, requests."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._numbers, self._rest, self.events = itertools.count(1), b"", []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        return self._call(method, self._session, **parameters)

    def visit(self, path: Path, *, width: int, height: int = 800, dark: bool = False, script: bool = True) -> None:
        """As a phone or a desktop of that width shows it."""
        self.events.clear()
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait_for("Page.loadEventFired")

    def ask(self, expression: str):
        """The value of a JavaScript expression. (Works where the page's own scripts are off, too.)"""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def requests(self) -> list[str]:
        """Addresses that were asked for, beside the page and what it holds itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("file:", "data:"))]

    def complaints(self) -> list[str]:
        """Errors and warnings of its console, of the policy it sets itself, and of scripts."""
        told = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in told]

    def _call(self, method: str, session: str | None = None, **parameters):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._next(lambda found: found.get("id") == number)
        assert "error" not in answer, answer
        return answer["result"]

    def _wait_for(self, method: str) -> None:
        if not any(event["method"] == method for event in self.events):
            self._next(lambda found: found.get("method") == method)

    def _next(self, wanted):
        """Reads until a message is the wanted one; events on the way are kept."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            while b"\0" not in self._rest:
                read = os.read(self._from, 1 << 20)
                assert read, "the browser has gone"
                self._rest += read
            line, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(line)
            if "method" in found:
                self.events.append(found)
            if wanted(found):
                return found
        raise TimeoutError("the browser does not answer")


@contextlib.contextmanager
def running(program: str) -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the block."""
    (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        # the protocol is read from descriptor 3 and written to 4
        command = ["bash", "-c", f'exec 3<&{to_read} 4>&{from_write}; exec "$@"', "bash", program, *QUIET,
                   f"--user-data-dir={profile}", "about:blank"]  # fmt: skip
        environment = os.environ | {"HOME": profile}
        with subprocess.Popen(
            command,
            pass_fds=(to_read, from_write),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
        ) as process:
            os.close(to_read), os.close(from_write)
            try:
                yield Browser(to_write, from_read)
            finally:
                process.terminate()
                process.wait(30)
                os.close(to_write), os.close(from_read)
