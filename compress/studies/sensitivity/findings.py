"""What a study finds, as `--json` writes it."""

from typing import TypedDict

from compress.prompts import Used
from compress.studies.results import Described


class CellFound(TypedDict):
    """A role of one unit in one format; `stored` is what fitted in its place."""

    layer: int | None
    unit: str
    kind: str
    role: str
    format: str
    stored: str
    parameters: int
    bytes: int
    kl_divergence_mean: float  # nats per token


class WorstTensor(TypedDict):
    name: str
    format: str  # as stored
    kl_divergence_mean: float  # nats per token
    parameters: int


class Measured(TypedDict):
    cells: list[CellFound]
    worst_tensors: list[WorstTensor]


class Study(Measured):
    schema: int
    model: Described
    prompts: list[Used]
