"""The build, in a process of its own: `python -m exporters.engines.child LOG`.

Reads a `Job` as one line of JSON from stdin (an empty one only loads a builder), and ends when stdin does, as it does where the
parent dies. Writes `Answer`s to stdout, one a line. Whatever libraries print goes to the log.
"""

import json
import os
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import TextIO

from compress.errors import first_line
from compress.output_folder.build_facts import ProfileFacts
from exporters.engines import callbacks, library, network
from exporters.engines.job import Answer, Job, ParserError
from exporters.engines.library import Builder

STATUS = Path("/proc/self/status")
NO_GPU = not any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/dxg"))


def main() -> None:
    channel = _private_stdout(sys.argv[1])
    job: Job | None = json.loads(sys.stdin.readline() or "null")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", DeprecationWarning)  # of the timing cache, which TensorRT-RTX has for show
    try:
        answer = _answer(job, channel)
    except library.UnusableError as error:
        answer = {"unusable": str(error)}
    except Exception as error:  # a library's, in ways of its own; a disk may be full
        traceback.print_exc()
        answer = {"failed": first_line(error)}
    sys.stderr.flush()
    _say(channel, answer)
    os._exit(0)  # libraries that were loaded by hand are not unloaded in an order that always works


def _private_stdout(log: str) -> TextIO:
    """What stdout is, under a number of its own; what is printed from here on goes to the log."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    return channel


def _end_with_parent() -> None:
    while sys.stdin.read(1):
        pass
    os._exit(1)


def _say(channel: TextIO, answer: Answer) -> None:
    channel.write(json.dumps(answer) + "\n")


def _answer(job: Job | None, channel: TextIO) -> Answer:
    builder = library.load()
    if job is None:
        return {"loaded": {"name": builder.name, "version": builder.version}}
    return _Build(builder, job, channel).run()


class _Build:
    """What is made here stays until the process ends: a builder holds on to what it was given without saying so."""

    def __init__(self, builder: Builder, job: Job, channel: TextIO):
        self._made_by, self._job, self._heard = builder, job, callbacks.Heard()
        trt = self._trt = builder.module
        progress = callbacks.Progress(lambda share: _say(channel, {"progress": share}))
        self._log, self._monitor = callbacks.logger(trt, self._heard), callbacks.monitor(trt, progress)
        self._builder = trt.Builder(self._log)
        self._network = self._builder.create_network(_strongly_typed(trt))
        self._parser = trt.OnnxParser(self._network, self._log)
        self._config = self._builder.create_builder_config()

    def run(self) -> Answer:
        began = time.monotonic()
        if not self._parser.parse_from_file(self._job["model"]):
            return {"refused": self._errors()}
        self._configure()
        if not self._write():
            return {"failed": self._heard.errors[0] if self._heard.errors else "it says no reason"}
        self._keep_timings()
        seconds, peak = time.monotonic() - began, _peak_bytes()
        inspected, unopened = self._inspected()
        return {
            "built": {
                "builder": {"name": self._made_by.name, "version": self._made_by.version},
                "seconds": seconds,
                "peak_rss_bytes": peak,
                "weight_bytes": self._heard.bytes.get("Weights"),
                "activation_bytes": self._heard.bytes.get("Activation"),
                "not_for": sorted(self._heard.not_for),
                "constants": network.constants(self._network),
                "inspected": inspected,
                "unopened": unopened,
            }
        }

    def _errors(self) -> list[ParserError]:
        errors = (self._parser.get_error(number) for number in range(self._parser.num_errors))
        return [
            {"description": error.desc(), "node": error.node_name(), "operator": error.node_operator()}
            for error in errors
        ]

    def _configure(self) -> None:
        """All that the inspector can be told, by whoever opens the engine on a GPU."""
        self._config.profiling_verbosity = self._trt.ProfilingVerbosity.DETAILED
        self._config.progress_monitor = self._monitor
        kept = Path(self._job["timings"])
        timings = self._config.create_timing_cache(kept.read_bytes() if kept.is_file() else b"")
        self._config.set_timing_cache(timings, ignore_mismatch=False)
        for profile in self._job["profiles"]:
            self._config.add_optimization_profile(self._profile(profile))

    def _profile(self, facts: ProfileFacts) -> object:
        profile = self._builder.create_optimization_profile()
        for name, shape in facts["inputs"].items():
            profile.set_shape(name, shape["min"], shape["opt"], shape["max"])
        return profile

    def _write(self) -> bool:
        """The engine goes to disk as the builder hands it over."""
        with open(self._job["engine"], "wb") as file:
            if hasattr(self._builder, "build_serialized_network_to_stream"):
                writer = callbacks.writer(self._trt, file)
                return bool(self._builder.build_serialized_network_to_stream(self._network, self._config, writer))
            engine = self._builder.build_serialized_network(self._network, self._config)
            if engine is not None:
                file.write(memoryview(engine))
            return engine is not None

    def _keep_timings(self) -> None:
        timings = self._config.get_timing_cache()
        if timings is not None:
            Path(self._job["timings"]).write_bytes(memoryview(timings.serialize()))

    def _inspected(self) -> tuple[str | None, str | None]:
        """Of the engine as it was written, and why it could not be opened. It takes a GPU to open one, and not any will do."""
        if NO_GPU:
            return None, None
        runtime, heard = self._trt.Runtime(self._log), len(self._heard.errors)
        engine = runtime.deserialize_cuda_engine(Path(self._job["engine"]).read_bytes())
        if engine is None:
            return None, next(iter(self._heard.errors[heard:]), "it says no reason")
        inspector = engine.create_engine_inspector()
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)), None


def _strongly_typed(trt: ModuleType) -> int:
    """The flag of networks that have the types the graph says; TensorRT 11 has no others."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _peak_bytes() -> int | None:
    """Of this process alone: what `getrusage` says counts the parent, which it was forked from."""
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
    return None if peak is None else 1024 * int(peak)


if __name__ == "__main__":
    main()
