"""Tensors that lie in one, such as the matrices of a layer's experts: one after the other along its first dimension, under a name
that is theirs in short.
"""

import onnx_ir as ir

from compress.errors import InputError
from compress.model.tensor_names import written_out
from exporters.graph.builder import FORMAT_KEY, MEMBERS_KEY


def members(tensor: ir.ExternalTensor) -> list[ir.ExternalTensor]:
    """Those that lie in a tensor, by their own names, each a part of the same file; of one that is no stack, itself."""
    pattern = tensor.metadata_props.get(MEMBERS_KEY)
    if pattern is None:
        return [tensor]
    names, shape = _names(tensor, pattern), tensor.shape.numpy()
    if not shape or shape[0] != len(names):
        raise InputError(f"{tensor.path}: '{tensor.name}' has shape {list(shape)} for {len(names)} tensors")
    size = tensor.nbytes // len(names)
    return [_part(tensor, name, shape[1:], (tensor.offset or 0) + place * size) for place, name in enumerate(names)]


def _names(tensor: ir.ExternalTensor, pattern: str) -> list[str]:
    try:
        return written_out([pattern])
    except ValueError as error:
        raise InputError(f"{tensor.path}: '{tensor.name}': {error}") from None


def _part(tensor: ir.ExternalTensor, name: str, shape: tuple[int, ...], offset: int) -> ir.ExternalTensor:
    place = tensor.location, offset, None, tensor.dtype
    part = ir.ExternalTensor(*place, shape=ir.Shape(shape), name=name, base_dir=tensor.base_dir)
    if FORMAT_KEY in tensor.metadata_props:
        part.metadata_props[FORMAT_KEY] = tensor.metadata_props[FORMAT_KEY]
    return part
