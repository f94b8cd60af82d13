"""Whether what was meant to be quantized is quantized in the engine: a builder may widen a layer without a word.

Where a GPU opened the engine its inspector tells. Else two things are looked at: the types of the parsed network, which is what
the builder was given, and how many bytes of weights the engine has, which is what it made of that.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from compress.output_folder.build_facts import LayerFacts

KINDS = ("int8", "int4", "fp8")  # what a number format's name begins with
OUTPUT = "_output"  # what the parser adds to a constant's name
SPARE_SHARE, SPARE_BYTES = 0.10, 1_000_000  # by which an engine's weights may exceed the formats' arithmetic


@dataclass(frozen=True)
class Verified:
    """`widened` are names of tensors."""

    layers: list[LayerFacts]
    widened: list[str]


def verify(
    formats: Mapping[str, str], stacks: Mapping[str, str], constants: Mapping[str, str], inspected: str | None,
    weight_bytes: int | None, expected: int,
) -> Verified:  # fmt: skip
    """`formats`: of every tensor by name. `stacks`: the names under which tensors lie that share one. `constants`: of the parsed
    network. `expected` and `weight_bytes`: of all weights, by the formats' arithmetic and in the engine, where that is known."""
    told = {} if inspected is None else dict(_inspected(inspected))
    layers = [
        _layer(name, stacks.get(name, name), number_format, constants, told)
        for name, number_format in _quantized(formats)
    ]
    wide = [facts["tensor"] for facts in layers if facts["precision"] != kind(facts["format"])]
    if not wide and not told and weight_bytes is not None and weight_bytes > most_bytes(expected):
        wide = [facts["tensor"] for facts in layers]
    return Verified(layers, wide)


def kind(number_format: str) -> str | None:
    """int8, int4 or fp8; None of what is not quantized."""
    return next((known for known in KINDS if number_format.startswith(known)), None)


def most_bytes(expected: int) -> int:
    return int(expected * (1 + SPARE_SHARE)) + SPARE_BYTES


def _quantized(formats: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    return ((name, number_format) for name, number_format in formats.items() if kind(number_format))


def _layer(
    name: str, stored: str, number_format: str, constants: Mapping[str, str], told: Mapping[str, str]
) -> LayerFacts:
    if stored in told:
        return {"tensor": name, "format": number_format, "precision": told[stored], "source": "inspector"}
    return {"tensor": name, "format": number_format, "precision": constants.get(stored), "source": "network"}


def _inspected(said: str) -> Iterator[tuple[str, str]]:
    """Of every tensor that a layer of the engine reads under the name it has in the graph: its type there, such as `int8`."""
    for layer in json.loads(said).get("Layers", []):
        for tensor in (
            layer.get("Inputs", []) if isinstance(layer, dict) else []
        ):  # names alone, where little was asked for
            words = str(tensor.get("Format/Datatype", "")).lower()
            yield str(tensor.get("Name", "")).removesuffix(OUTPUT), next((k for k in KINDS if k in words), words)
