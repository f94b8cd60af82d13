"""What passes did to the tensors of a checkpoint, as its config.json keeps it: so that each can be judged against the original.

A record is the work of one pass, and records stand in the order of the passes. Its changes stand in the order in which they
were made, and speak of the tensors by the names they have after the pass. Number formats are not among them:
`quantization_config` has those.
"""

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr, model_validator

from compress.formats.state_words import MOST_EVERY, SEEDS, Axis, Format, Residual, Rounding, Scale, why_unfit
from compress.model.expert_counts import SECTION, ExpertCounts
from compress.model.tensor_names import written_out
from compress.strict.json_text import JsonObject

KEY, STATES = "passes", "states"  # in the section
STATE_PRECISION = "state_precision"  # the pass that decides formats of states
MOST_EXPERTS = 10_000
MOST_CHANNELS = 1 << 24


def _readable(patterns: tuple[str, ...]) -> tuple[str, ...]:
    written_out(patterns)
    return patterns


def _unpackable(text: str) -> str:
    unpacked(text)
    return text


def _distinct(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(numbers)) != len(numbers):
        raise ValueError("the same number stands there twice")
    return numbers


Names = Annotated[
    tuple[StrictStr, ...], Field(min_length=1), AfterValidator(_readable)
]  # as `tensor_names` writes them
Number = Annotated[StrictInt, Field(ge=0, lt=MOST_EXPERTS)]
Numbers = Annotated[tuple[Number, ...], Field(min_length=1), AfterValidator(_distinct)]


class _Change(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Kept(_Change):
    """Experts were removed: the tensors `STEM0.` and so on are those of expert sources[0] and so on. Of each group in
    `merged`, in the old numbers, the first expert is now the average of all."""

    kind: Literal["kept"] = "kept"
    stem: StrictStr  # such as `model.layers.1.feed_forward.experts.`
    sources: Numbers
    merged: tuple[Annotated[Numbers, Field(min_length=2)], ...] | None = None


class Rows(_Change):
    """Row i is what was row rows[i]."""

    kind: Literal["rows"] = "rows"
    tensors: Names
    rows: Numbers


class Scaled(_Change):
    """Multiplied by a factor, and rounded to the stored type."""

    kind: Literal["scaled"] = "scaled"
    tensors: Names
    factor: StrictFloat = Field(gt=0)


class Recomputed(_Change):
    """Given values that do not follow from the original's alone."""

    kind: Literal["recomputed"] = "recomputed"
    tensors: Names
    by: StrictStr  # such as `least_squares`


class Folded(_Change):
    """With e the exponents, row i of `source` was multiplied by 2 ** -e[i], column i of `targets` by 2 ** e[i]. They are
    signed bytes, compressed by zlib, in base64."""

    kind: Literal["folded"] = "folded"
    source: StrictStr
    targets: Names
    exponents: Annotated[StrictStr, AfterValidator(_unpackable)]


class Rotated(_Change):
    """Stored times a Hadamard matrix, in blocks of so many inputs."""

    kind: Literal["rotated"] = "rotated"
    tensors: Names
    block: StrictInt = Field(ge=2, le=MOST_CHANNELS)


class Rounded(_Change):
    """To the stored format, each value by itself or with the errors of others compensated for (GPTQ)."""

    kind: Literal["rounded"] = "rounded"
    tensors: Names
    method: Literal["nearest", "gptq"]


Change = Kept | Rows | Scaled | Recomputed | Folded | Rotated | Rounded


class Record(BaseModel):
    """What one pass did; `changes` is None where it does not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: StrictStr
    changes: tuple[Annotated[Change, Field(discriminator="kind")], ...] | None = None


class KeptState(BaseModel):
    """How a state of a layer is kept between calls, where not in float32 (`formats/remembered.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: Annotated[StrictInt, Field(ge=0)]
    state: StrictStr  # such as `recurrent_state`
    format: Format
    rounding: Rounding = "nearest"
    residual: Residual | None = None  # of error feedback; None: int8
    every: Annotated[StrictInt, Field(ge=1, le=MOST_EVERY)] = 1  # tokens between two roundings
    scale: Scale = "dynamic"
    axis: Axis | None = None  # along which entries of a recurrent state share a scale; None: d_state
    block: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, lt=SEEDS)] = 0

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if why := why_unfit(self):
            raise ValueError(why)
        return self


class Compressed(ExpertCounts):
    """The `compress` section of config.json."""

    passes: tuple[Record, ...] = ()
    states: tuple[KeptState, ...] = ()


def added(values: JsonObject, records: Sequence[Record]) -> JsonObject:
    """config.json with the records of one more run."""
    if not records:
        return values
    section = values.get(SECTION)
    kept = section if isinstance(section, Mapping) else {}
    earlier = kept.get(KEY)
    new = [record.model_dump(mode="json", exclude_none=True) for record in records]
    return values | {SECTION: {**kept, KEY: [*(earlier if isinstance(earlier, list) else ()), *new]}}


def decided_states(records: Iterable[Record]) -> bool:
    """Whether one of these passes decided in which formats states are kept."""
    return any(record.name == STATE_PRECISION for record in records)


def with_states(values: JsonObject, decided: Iterable[KeptState]) -> JsonObject:
    """config.json with these states kept so, in place of what it said of them."""
    section = values.get(SECTION)
    kept = dict(section) if isinstance(section, Mapping) else {}
    earlier = kept.get(STATES)
    came = map(KeptState.model_validate, earlier if isinstance(earlier, list) else ())
    states = {(state.layer, state.state): state for state in (*came, *decided)}
    written = [states[place].model_dump(mode="json", exclude_none=True) for place in sorted(states)]
    return values | {SECTION: {**kept, STATES: written}}


def without_states(values: JsonObject) -> JsonObject:
    """config.json that says nothing of states: they are kept in float32."""
    section = values.get(SECTION)
    if not isinstance(section, Mapping) or STATES not in section:
        return values
    return values | {SECTION: {key: value for key, value in section.items() if key != STATES}}


def packed(exponents: Iterable[int]) -> str:
    """Exponents from -128 to 127, as `Folded` has them."""
    return base64.b64encode(zlib.compress(bytes(exponent & 0xFF for exponent in exponents), 9)).decode("ascii")


def unpacked(text: str) -> list[int]:
    """The exponents again; raises ValueError for what `packed` does not write."""
    reader = zlib.decompressobj()
    try:
        found = reader.decompress(base64.b64decode(text, validate=True), MOST_CHANNELS + 1)
    except (ValueError, zlib.error):
        raise ValueError("expected signed bytes, compressed by zlib, in base64") from None
    if not reader.eof or reader.unused_data or not 0 < len(found) <= MOST_CHANNELS:
        raise ValueError(f"expected 1 to {MOST_CHANNELS} exponents, and nothing after them")
    return [byte - 256 if byte > 127 else byte for byte in found]
