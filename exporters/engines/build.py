"""An engine of an exported graph, where there is a builder, and what is known of it: the content of build.json."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from compress.disk import cache
from compress.errors import WorkError
from compress.output_folder.build_facts import BuildFacts, ProfileFacts
from compress.output_folder.overflow_facts import OverflowFacts
from compress.terminal import progress
from exporters.engines import ENGINE, LOG, messages, process, sections, timings, verify
from exporters.engines.job import Answer, Built, Job
from exporters.graph.members import members

STEPS = 100  # of the progress bar
NO_GPU_RAN_IT = "an engine runs only on a GPU that it was built for, and none was used"
ONLY_OPENED = "a GPU opened it for what its inspector says, and nothing was run"


@dataclass(frozen=True)
class Wanted:
    """`model` is the graph, written; `formats` those of its tensors by name, `expected_bytes` what they take by arithmetic."""

    model: Path
    precision: str
    checked: Literal["file", "twin"]
    profiles: list[ProfileFacts]
    formats: Mapping[str, str]
    expected_bytes: int
    overflow: OverflowFacts | None = None


def without_engine(wanted: Wanted, why: str) -> BuildFacts:
    return {
        "engine": None, "why_not_built": why, "builder": None, "version": None, "precision": wanted.precision,
        "profiles": wanted.profiles, "seconds": None, "peak_rss_bytes": None, "engine_bytes": None,
        "engine_weight_bytes": None, "expected_weight_bytes": wanted.expected_bytes, "activation_bytes": None,
        "not_for": [], "layers": [], "widened": [], "executed": False, "why_not_executed": "there is no engine",
        "checked": wanted.checked, "overflow": wanted.overflow,
    }  # fmt: skip


def build(wanted: Wanted, graph: ir.Graph) -> BuildFacts:
    """Writes the engine and the builder's log beside the graph. Raises WorkError where the build fails."""
    folder = wanted.model.parent
    log = folder / LOG
    with cache.scratch("engine") as scratch, progress.task("building the engine", STEPS) as advance:
        job: Job = {
            "model": str(wanted.model),
            "engine": str(folder / ENGINE),
            "timings": str(scratch / "timings"),
            "profiles": wanted.profiles,
        }
        try:
            with timings.kept(scratch / "timings", process.found()):
                built = _finished(process.run(job, log, _Steps(advance)), graph)
        except WorkError as error:
            raise WorkError(f"{error}; its log: {_kept_log(log)}") from None
    return _facts(wanted, folder / ENGINE, built, _lying(graph))


class _Steps:
    """A share of the whole as steps of the bar."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance, self._done = advance, 0

    def __call__(self, share: float) -> None:
        steps = int(share * STEPS) - self._done
        self._done += steps
        self._advance(steps)


def _finished(answer: Answer, graph: ir.Graph) -> Built:
    if "built" in answer:
        return answer["built"]
    if "refused" in answer:
        raise WorkError(
            f"export to tensorrt: TensorRT does not take the graph: {messages.refusal(answer['refused'], graph)}"
        )
    why = messages.failure(answer["failed"] if "failed" in answer else answer["unusable"], graph)
    raise WorkError(f"export to tensorrt: the engine was not built: {why}")


def _kept_log(log: Path) -> Path:
    """Of a build that failed, whose folder goes."""
    kept = cache.folder("engine") / LOG
    with cache.publish(kept) as partial:
        shutil.copyfile(log, partial)
    return kept


@dataclass(frozen=True)
class _Lying:
    """A tensor as it lies in the data file, and the name of the one it is in: itself, or a stack of several, which is all that a
    builder knows."""

    tensor: ir.ExternalTensor
    name: str


def _lying(graph: ir.Graph) -> dict[str, _Lying]:
    tensors = (value.const_value for value in graph.initializers.values())
    stored = (tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor))
    return {member.name: _Lying(member, tensor.name) for tensor in stored for member in members(tensor)}


def _facts(wanted: Wanted, engine: Path, built: Built, lying: Mapping[str, _Lying]) -> BuildFacts:
    weight_bytes = sections.weight_bytes(engine) or built["weight_bytes"]

    def as_stored(name: str) -> bool:
        return name in lying and sections.holds_row(engine, lying[name].tensor)

    seen = verify.Seen(built["constants"], built["inspected"], weight_bytes, as_stored)
    names = {name: found.name for name, found in lying.items()}
    verified = verify.verify(wanted.formats, names, wanted.expected_bytes, seen)
    return without_engine(wanted, "") | {
        "engine": engine.name, "why_not_built": None, "builder": built["builder"]["name"],
        "version": built["builder"]["version"], "seconds": round(built["seconds"], 3),
        "peak_rss_bytes": built["peak_rss_bytes"], "engine_bytes": engine.stat().st_size,
        "engine_weight_bytes": weight_bytes, "activation_bytes": built["activation_bytes"], "not_for": built["not_for"],
        "layers": verified.layers, "widened": verified.widened, "why_not_executed": why_not_executed(built),
    }  # fmt: skip


def why_not_executed(built: Built) -> str:
    if built["unopened"] is not None:
        return f"the GPU here does not open it: {messages.one_line(built['unopened'])}"
    return NO_GPU_RAN_IT if built["inspected"] is None else ONLY_OPENED
