"""Whether what was meant to be quantized is quantized in the engine: a builder may widen a layer without a word.

Where a GPU opened the engine its inspector tells. Else two things are looked at: the types of the parsed network, which is what
the builder was given, and how many bytes of weights the engine has, which is what it made of that.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from compress.output_folder.build_facts import LayerFacts

KINDS = ("int8", "int4", "fp8")  # what a number format's name begins with
OUTPUT = "_output"  # what the parser adds to a constant's name
SPARE_SHARE, SPARE_BYTES = 0.10, 1_000_000  # by which an engine's weights may exceed the formats' arithmetic


@dataclass(frozen=True)
class Seen:
    """What was made of a graph. `constants`: types in the parsed network. `inspected`: what the inspector says, JSON, where it could.
    `weight_bytes`: of the engine, where they are known. `as_stored`: whether a tensor's bytes lie in the engine."""

    constants: Mapping[str, str]
    inspected: str | None
    weight_bytes: int | None
    as_stored: Callable[[str], bool]


@dataclass(frozen=True)
class Verified:
    """`widened` are names of tensors."""

    layers: list[LayerFacts]
    widened: list[str]


def verify(formats: Mapping[str, str], stored_as: Mapping[str, str], expected: int, seen: Seen) -> Verified:
    """`formats`: of every tensor by name. `stored_as`: the names they have in the graph, where those are others. `expected`: bytes
    of all weights by the formats' arithmetic. Where the engine has more, and nothing else tells which tensor that is, it is all
    that do not lie in it as they were stored."""
    told = {} if seen.inspected is None else dict(_inspected(seen.inspected))
    quantized = {name: number_format for name, number_format in formats.items() if kind(number_format)}
    layers = [_layer(name, stored_as.get(name, name), quantized[name], seen.constants, told) for name in quantized]
    wide = [facts["tensor"] for facts in layers if facts["precision"] != kind(facts["format"])]
    if not wide and seen.weight_bytes is not None and seen.weight_bytes > most_bytes(expected):
        wide = [name for name in quantized if not seen.as_stored(name)] or [*quantized]
    return Verified(layers, wide)


def kind(number_format: str) -> str | None:
    """int8, int4 or fp8; None of what is not quantized."""
    return next((known for known in KINDS if number_format.startswith(known)), None)


def most_bytes(expected: int) -> int:
    return int(expected * (1 + SPARE_SHARE)) + SPARE_BYTES


def _layer(
    name: str, stored: str, number_format: str, constants: Mapping[str, str], told: Mapping[str, str]
) -> LayerFacts:
    if stored in told:
        return {"tensor": name, "format": number_format, "precision": told[stored], "source": "inspector"}
    return {"tensor": name, "format": number_format, "precision": constants.get(stored), "source": "network"}


def _inspected(said: str) -> Iterator[tuple[str, str]]:
    """Of every tensor that a layer of the engine reads under the name it has in the graph: its type there, such as `int8`."""
    for layer in json.loads(said).get("Layers", []):
        inputs = layer.get("Inputs", []) if isinstance(layer, dict) else []  # a name alone, where little was asked for
        for tensor in inputs:
            words = str(tensor.get("Format/Datatype", "")).lower()
            yield str(tensor.get("Name", "")).removesuffix(OUTPUT), next((k for k in KINDS if k in words), words)
