"""Numbers of attention heads, of which runtimes' configurations take one for all layers."""

from typing import NamedTuple

from compress.model.architecture import Architecture
from compress.model.blocks.attention import Attention


class Heads(NamedTuple):
    queries: int
    key_values: int
    size: int


def heads_of(architecture: Architecture) -> Heads:
    """Of the first attention block; of a model without any, a single head, which no runtime makes a cache for."""
    blocks = (block for layer in architecture.layers for block in layer.blocks)
    first = next((block for block in blocks if isinstance(block, Attention)), None)
    if first is None:
        return Heads(1, 1, architecture.config.hidden_size)
    return Heads(first.heads, first.kv_heads, first.head_dim)
