"""build.json beside a graph for TensorRT: what was built of it, by what, and what was verified and what was not."""

from pathlib import Path
from typing import Literal, TypedDict, cast

from compress.disk.json_files import read_json
from compress.errors import InputError
from compress.output_folder.onnx_layouts import TENSORRT
from compress.output_folder.overflow_facts import OverflowFacts


class ProfileFacts(TypedDict):
    """The shapes an engine takes: of every input the smallest, the usual and the largest, as `min`, `opt` and `max`."""

    name: Literal["prefill", "decode"]
    inputs: dict[str, dict[str, list[int]]]


class LayerFacts(TypedDict):
    """A tensor that is meant to be quantized, and the type it has according to `source`; None where that does not tell."""

    tensor: str
    format: str
    precision: str | None
    source: Literal["inspector", "network"]


class BuildFacts(TypedDict):
    """`engine` is a file's name. What concerns an engine is None where none was built, `why_not_built` where one was.
    `activation_bytes` are what it takes of a GPU's memory beside weights and states, in the larger of its profiles. `not_for`
    are GPUs that lack a type it computes in, such as sm80 fp8."""

    engine: str | None
    why_not_built: str | None
    builder: str | None
    version: str | None
    precision: str
    profiles: list[ProfileFacts]
    seconds: float | None
    peak_rss_bytes: int | None
    engine_bytes: int | None
    engine_weight_bytes: int | None
    activation_bytes: int | None
    not_for: list[str]
    expected_weight_bytes: int
    layers: list[LayerFacts]
    widened: list[str]
    executed: bool
    why_not_executed: str
    checked: Literal["file", "twin"]
    overflow: OverflowFacts | None


def beside(artifact: Path) -> BuildFacts | None:
    """Of what was built of a graph; None where nothing tells, or a file of that name is another tool's."""
    path = artifact.with_name(TENSORRT.config)
    if artifact.suffix != ".onnx" or not path.is_file() or "expected_weight_bytes" not in read_json(path):
        return None
    return read(path)


def read(path: Path) -> BuildFacts:
    """Raises InputError for a file that lacks what we write."""
    found = read_json(path)
    if missing := sorted(BuildFacts.__required_keys__ - found.keys()):
        raise InputError(f"{path}: has no '{missing[0]}', which every build.json of this tool has")
    return cast(BuildFacts, found)


def sentence(facts: BuildFacts) -> str:
    """What a report says of it."""
    if facts["engine"] is None:
        return f"no engine was built: {facts['why_not_built']}"
    wide = f", but {len(facts['widened'])} of its layers were widened" if facts["widened"] else ""
    not_for = f" (not for {', '.join(facts['not_for'])})" if facts["not_for"] else ""
    where = (
        "in it" if all(layer["source"] == "inspector" for layer in facts["layers"]) else "by its network and its bytes"
    )
    verified = f"{len(facts['layers'])} quantized tensors verified {where}{wide}, " if facts["layers"] else ""
    return (
        f"{facts['engine']} built by {facts['builder']} {facts['version']} in {facts['seconds']:.0f} s{not_for}, {verified}"
        f"not executed: {facts['why_not_executed']}"
    )
