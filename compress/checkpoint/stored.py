"""A weight as it lies in a file: from names, shapes and formats to something that loads itself."""

from collections.abc import Callable
from functools import cache

import torch

from compress import formats
from compress.checkpoint.compressed_tensors import Scheme
from compress.formats.activations import Activation
from compress.formats.base import Quantized
from compress.model.weight import INPUT_SCALE, Spec, Weight

Read = Callable[[str, slice | None], torch.Tensor]  # a stored tensor, or a block of its rows


def reread(weight: Weight, read: Read) -> Weight:
    """A weight of the same name, format and activation that loads itself through `read`."""
    spec = Spec(weight.name, weight.shape, weight.role)
    if not weight.is_quantized:
        return plain_weight(spec, weight.format, read)
    return quantized_weight(spec, Scheme.of(weight), read)


def plain_weight(spec: Spec, format_name: str, read: Read) -> Weight:
    def load(rows: slice | None = None) -> torch.Tensor:
        return read(spec.name, rows)

    return Weight(spec.name, spec.role, spec.shape, format_name, load)


def quantized_weight(spec: Spec, scheme: Scheme, read: Read) -> Weight:
    number_format, stem = formats.get(scheme.format), spec.name.removesuffix("weight")
    activation = _activation(scheme.activation, stem, read) if scheme.activation else None
    layout = number_format.layout(spec.shape, packed=activation is None)

    def load(rows: slice | None = None) -> Quantized:
        parts = {suffix: read(stem + suffix, part.rows(rows)) for suffix, part in layout.items()}
        return number_format.unpack(parts, spec.shape)

    return Weight(spec.name, spec.role, spec.shape, scheme.format, load, activation, scheme.rotation)


def _activation(name: str, stem: str, read: Read) -> Activation:
    activation = Activation(name)
    if not activation.is_static:
        return activation
    return Activation(
        name, cache(lambda: float(read(stem + INPUT_SCALE, None)))
    )  # asked for with every block of tokens
