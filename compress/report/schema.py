"""report.json, schema 1 of the contract, as types."""

from typing import NotRequired, TypedDict

from compress.check.changes import ChangeFacts
from compress.check.compare import FoundFacts, Verdict
from compress.check.earlier import AgainstFacts
from compress.model.sizes import MemoryFacts, StateFacts
from compress.output_folder.build_facts import BuildFacts
from compress.prompts import Used
from compress.runtime.runtimes import RuntimeFacts
from compress.strict.json_text import JsonObject


class ModelFacts(TypedDict):
    name: str
    revision: str | None
    weights_sha256: str
    model_type: str
    parameters: int
    active_parameters: int


class SizeFacts(TypedDict):
    """Of the smallest artifact written, weights with scales."""

    baseline_bytes: int
    baseline_float32_bytes: int
    candidate_bytes: int
    bits_per_weight: float
    candidate_parameters: int


class PassFacts(TypedDict):
    name: str
    seconds: float
    peak_rss_bytes: int
    details: JsonObject


class CoverageFacts(TypedDict):
    """`below_threshold` says what was done about the experts that are listed."""

    min_tokens: int
    experts_below_threshold: list[str]
    below_threshold: NotRequired[str]


class CalibrationFacts(TypedDict):
    tokens: int
    prompts: list[str]
    windows: int
    warnings: NotRequired[list[str]]
    expert_coverage: NotRequired[CoverageFacts]


class ArtifactFacts(TypedDict):
    """`bytes` is everything it needs to run but the tokenizer, `graph_bytes` the part of it that is not weights."""

    kind: str
    path: str
    bytes: int
    graph_bytes: int
    weight_bytes: int
    bits_per_weight: float
    notes: NotRequired[list[str]]
    build: NotRequired[BuildFacts]


class StateMemoryFacts(TypedDict):
    """What a sequence takes, by kind of state, before and after."""

    baseline: dict[str, MemoryFacts]
    candidate: dict[str, MemoryFacts]


class Report(FoundFacts):
    schema: int
    verdict: Verdict
    model: ModelFacts
    size: SizeFacts
    passes: list[PassFacts]
    calibration: NotRequired[CalibrationFacts]
    artifacts: list[ArtifactFacts]
    runtimes: list[RuntimeFacts]
    states: list[StateFacts]
    state_memory: StateMemoryFacts
    prompts: list[Used]
    versions: dict[str, str]


class BaselineFacts(TypedDict):
    name: str
    sha256: str


class AcrossFacts(TypedDict, total=False):
    """What a check has more: `change` where the baseline is an artifact itself, so that neither of the two is the truth."""

    change: list[ChangeFacts]
    against_result: AgainstFacts


class CheckFacts(FoundFacts, AcrossFacts):
    """What `check --json` writes."""

    schema: int
    verdict: Verdict
    baseline: BaselineFacts
    candidate: str
    prompts: list[Used]
    versions: dict[str, str]
