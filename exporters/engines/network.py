"""What a parsed network is made of: which types its constants have."""

from typing import Protocol

NARROW = ("int8", "int4", "fp8")


class Named(Protocol):
    name: str


class Tensor(Protocol):
    name: str
    dtype: Named


class Layer(Protocol):
    name: str
    type: Named

    def get_input(self, index: int) -> Tensor | None: ...

    def get_output(self, index: int) -> Tensor | None: ...


class Network(Protocol):
    num_layers: int

    def get_layer(self, index: int) -> Layer: ...


def constants(network: Network) -> dict[str, str]:
    """Name of a constant -> its type, such as `int8`, `fp8`, `int4`, `half`; of one in few bits that no DequantizeLinear
    widens, which would be integers to compute with, `int8, never dequantized`."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    widened = {stored.name for layer in layers if layer.type.name == "DEQUANTIZE" and (stored := layer.get_input(0))}
    found: dict[str, str] = {}
    for layer in layers:
        if layer.type.name == "CONSTANT" and (value := layer.get_output(0)) is not None:
            kind = value.dtype.name.lower()
            found[layer.name] = kind if kind not in NARROW or value.name in widened else f"{kind}, never dequantized"
    return found
