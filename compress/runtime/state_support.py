"""Which states the runtimes of others can begin with and carry: they know one type and one shape for all layers."""

from collections.abc import Sequence

from compress.model.block import Layer
from compress.model.states import StateKind, StateSpec


def why_not_genai(layers: Sequence[Layer]) -> str | None:
    """What stops onnxruntime-genai, or None. It takes type and shape of all states of a name from the first layer that has
    one, and those of keys for values too; parts beside a state it does not know."""
    found: dict[str, tuple[int, StateSpec]] = {}
    for layer in layers:
        for spec in layer.states:
            if beside := [part.name for part in spec.parts if part is not spec]:
                return f"it does not carry '{beside[0]}', which layer {layer.index} keeps beside '{spec.name}'"
            name = "key" if spec.kind == StateKind.KV else spec.name
            first_layer, first = found.setdefault(name, (layer.index, spec))
            if _looks(spec) != _looks(first):
                return (
                    f"it takes the states of all layers for alike, but '{spec.name}' of layer {layer.index} is {_words(spec)} "
                    f"and '{first.name}' of layer {first_layer} is {_words(first)}"
                )
    return None


def why_not_transformers_js(layers: Sequence[Layer]) -> str | None:
    """It begins with zeros in float32."""
    specs = ((layer.index, spec) for layer in layers for spec in layer.carried)
    other = next(((index, spec) for index, spec in specs if spec.precision.format != "fp32"), None)
    if other is None:
        return None
    return f"it takes states in fp32, and '{other[1].name}' of layer {other[0]} is {other[1].precision.format}"


def _looks(spec: StateSpec) -> tuple[object, ...]:
    return spec.precision.dtype, spec.stored_shape


def _words(spec: StateSpec) -> str:
    return f"{spec.precision.format} {[size or 'tokens' for size in spec.stored_shape]}"
