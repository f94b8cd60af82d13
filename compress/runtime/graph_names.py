"""What inputs and outputs of a graph and their dimensions are called, by onnxruntime-genai and by Transformers.js.

genai             past_key_values.N.key  .value  .conv_state  .recurrent_state   ->  present.N. ...
transformers.js   past_key_values.N.key  .value  past_conv.N  past_ssm.N         ->  present.N. ...  present_conv.N ...
"""

from compress.model.states import StateSpec

BATCH, SEQUENCE, PAST, TOTAL = DIMENSIONS = (
    "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length",
)  # fmt: skip
JS = {"conv_state": "conv", "recurrent_state": "ssm"}
KINDS = {short: kind for kind, short in JS.items()}
EDGE_KEY = "compress.edge"  # metadata of a node whose result ends a block: the type that it is in
DIALECT_KEY = "compress.dialect"  # metadata of a graph in one that onnxruntime does not run for its users


def past_of(index: int, spec: StateSpec) -> str:
    """The input that a state of a layer comes in by."""
    return f"past_key_values.{index}.{spec.name}"


def dimensions(spec: StateSpec, length: str) -> tuple[int | str, ...]:
    """A state's shape; `length` names the dimension that grows."""
    return (BATCH, *(length if axis == spec.grows else size for axis, size in enumerate(spec.stored_shape)))


def is_past(name: str) -> bool:
    return name.startswith("past_")


def present_of(past: str) -> str:
    """The output that is fed back as this input."""
    return past.replace("past_key_values", "present").replace("past_", "present_")


def kind_of(past: str) -> str:
    """key, value, conv_state or recurrent_state."""
    first, _, last = past.partition(".")
    return KINDS.get(first.removeprefix("past_")) or last.rpartition(".")[2]


def in_transformers_js(name: str) -> str:
    """An input's or output's name in that layout, from the one in genai's."""
    first, _, rest = name.partition(".")
    index, _, kind = rest.partition(".")
    return f"{first.partition('_')[0]}_{JS[kind]}.{index}" if kind in JS else name
