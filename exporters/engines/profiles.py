"""The sizes an engine is built for: one profile for prompts and one for single tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from compress.output_folder.build_facts import ProfileFacts
from compress.runtime.graph_names import BATCH, PAST, SEQUENCE, TOTAL
from exporters.graph.ssd import CHUNK

# Where the new tokens of a profile can only be one, TensorRT-RTX 1.7 multiplies by other kernels, and lays every weight out a
# second time for them. Where they can only be one chunk of Mamba-2, its compiler fails.
LEAST_LONGEST = CHUNK + 1
# Where there can only be one sequence, its compiler fails on some graphs in fp16, such as int8 weights of a Jamba
LEAST_BATCH = 2


class Extent(NamedTuple):
    """Sequences, new tokens in each, and tokens they follow."""

    batch: int
    new: int
    past: int

    def sizes(self) -> dict[str, int]:
        return {BATCH: self.batch, SEQUENCE: self.new, PAST: self.past, TOTAL: self.past + self.new}


def of(
    inputs: Mapping[str, Sequence[int | str]], *, batch: int, prefill_length: int, context: int
) -> list[ProfileFacts]:
    """Of a graph with inputs of these shapes, names of dimensions among them, for up to `batch` sequences of up to `context`
    tokens, `prefill_length` of which come at once. A prompt may be continued, in pieces."""
    longest, most = max(prefill_length, LEAST_LONGEST), max(batch, LEAST_BATCH)
    prefill = (
        Extent(1, 1, 0),
        Extent(batch, prefill_length, 0),
        Extent(most, longest, max(0, context - prefill_length)),
    )
    decode = (Extent(1, 1, 0), Extent(batch, 1, (context - 1) // 2), Extent(most, LEAST_LONGEST, context - 1))
    return [
        {"name": "prefill", "inputs": _shapes(inputs, prefill)},
        {"name": "decode", "inputs": _shapes(inputs, decode)},
    ]


def _shapes(
    inputs: Mapping[str, Sequence[int | str]], extents: tuple[Extent, Extent, Extent]
) -> dict[str, dict[str, list[int]]]:
    named = dict(zip(("min", "opt", "max"), (extent.sizes() for extent in extents), strict=True))
    return {
        name: {
            which: [size if isinstance(size, int) else sizes[size] for size in shape] for which, sizes in named.items()
        }
        for name, shape in inputs.items()
    }
