"""What a survey finds, as `--json` writes it."""

from typing import TypedDict

from compress.prompts import Used
from compress.studies.results import Described


class Loss(TypedDict):
    """What is lost where so many experts are kept, by the way to treat the router."""

    kept: int
    loss: dict[str, float]


class Predicted(Loss):
    experts: list[int]


class Layer(TypedDict):
    """One MoE layer: lists over its experts."""

    layer: int
    experts: int
    top_k: int
    tokens: list[int]
    share: list[float]
    dead: list[int]
    scores: dict[str, list[float]]
    similarity: list[list[float]]
    predicted: list[Predicted]


class Survey(TypedDict):
    schema: int
    model: Described
    prompts: list[Used]
    tokens: int
    layers: list[Layer]
    total: list[Loss]
