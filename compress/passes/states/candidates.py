"""What a search may choose from, as data: how every kind of state begins, and what it may be narrowed to.

Scales are dynamic: the weights are written when the search begins. A candidate that a state cannot have, or that takes no
fewer bytes there, is passed over.
"""

from collections.abc import Mapping

from compress.formats.state_words import Kind
from compress.passes.state_precision import StateFormat

# what the arithmetic of memory counts where nothing else is said
START: Mapping[Kind, StateFormat] = {
    "ssm_state": StateFormat(format="fp32"),
    "conv_state": StateFormat(format="bf16"),
    "kv_cache": StateFormat(format="bf16"),
}

CANDIDATES: Mapping[Kind, tuple[StateFormat, ...]] = {
    "ssm_state": (
        StateFormat(format="bf16"),
        StateFormat(format="int8", rounding="stochastic"),
        StateFormat(format="int4", rounding="stochastic"),
    ),
    "conv_state": (),  # three inputs a channel: a scale of its own would cost as much as it saves
    "kv_cache": (
        StateFormat(format="int8"),
        StateFormat(format="int4", block=16),
        StateFormat(format="int4", block=32),
        StateFormat(format="int4"),
    ),
}
