"""Every stored tensor against what the original and the records say it ought to be: the same bit for bit where no pass touched it,
and where it was quantized no further off than its format and method explain (`explained.py`)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NotRequired, TypedDict

from compress import formats
from compress.check import discrepancy, explained
from compress.check.discrepancy import Discrepancy
from compress.check.explained import Judged
from compress.model import records
from compress.model.hybrid import HybridModel
from compress.model.records import Record
from compress.model.replay import Ought, replayed, since
from compress.model.roles import Role
from compress.model.weight import Weight
from compress.passes.quantization import rounding
from compress.terminal.progress import Advance

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")  # where texts end is for those who generate to say
ANOTHER = (
    0.7  # a relative error from which a tensor may be another one: of two that have nothing in common it is about 1.4
)
STATES = "compress.states"


class AuditFacts(TypedDict):
    """A row as JSON has it; the error is None where the original has nothing to compare with, or a value is not finite. Where few
    rows or columns differ, both figures are of the worst one of them; of a gain, they are what it is off by."""

    artifact: str
    tensor: str
    format: str
    relative_error: float | None
    expected_at_most: float | None
    passed: bool
    note: NotRequired[str]


def stage(artifact: str) -> str:
    """What the progress of it is shown under."""
    return f"{artifact}: audit of weights"


@dataclass(frozen=True)
class Models:
    """What is compared."""

    original: HybridModel
    candidate: HybridModel

    @cached_property
    def done(self) -> Sequence[Record]:
        """What passes did to the one until it was the other."""
        return since(self.original.config.compress.passes, self.candidate.config.compress.passes)

    @property
    def is_told(self) -> bool:
        """Whether every pass told what it did."""
        return all(record.changes is not None for record in self.done)

    @cached_property
    def ought(self) -> Mapping[str, Ought]:
        """What each tensor of the candidate ought to be, by its name there."""
        return replayed(self.original.weights, self.done)


def audit(artifact: str, models: Models, advance: Advance) -> Iterator[AuditFacts]:
    """A row for each tensor of the candidate, and for each that it lacks. `advance` hears of parameters."""
    siblings, stored = _siblings(models.ought), set[str]()
    for weight in models.candidate.weights:
        yield _row(artifact, weight.name, weight.format, _judged(weight, models, siblings))
        advance(weight.parameters)
        stored.add(weight.name)
    if models.is_told:
        yield from _missing(artifact, models, stored)
        yield from _states(artifact, models)
        yield from _configuration(artifact, models)


def _missing(artifact: str, models: Models, stored: set[str]) -> Iterator[AuditFacts]:
    for name, ought in models.ought.items():
        if name not in stored and ought.weight is not None and ought.weight.role != Role.MTP:
            yield _row(artifact, name, ought.weight.format, Judged(None, None, False, "is not there"))


def nearest(stored: Weight, ought: Weight) -> Weight:
    """What ought to be there, rounded to nearest in the stored format, with scales in the type in which they are stored."""
    if not stored.is_quantized:
        return rounding.as_plain(ought, stored.format)
    rounded = rounding.to_nearest(ought, formats.get(stored.format), clips=False, rotation=stored.rotation)
    return rounded.with_scales_in(stored.scale_dtype)


def _states(artifact: str, models: Models) -> Iterator[AuditFacts]:
    """Formats of states that no pass says it decided on."""
    kept = set(models.candidate.config.compress.states) - set(models.original.config.compress.states)
    if kept and not records.decided_states(models.done):
        first = min(kept, key=lambda state: (state.layer, state.state))
        note = f"keeps {first.state} of layer {first.layer} in {first.format}, and no pass says that it decided so"
        yield _row(artifact, STATES, first.format, Judged(None, None, False, note))


def _configuration(artifact: str, models: Models) -> Iterator[AuditFacts]:
    """Values of config.json that decide what a model computes, and that no pass changes."""
    before, after = models.original.config, models.candidate.config
    architecture = models.original.architecture
    changed_by_passes = {"compress", *architecture.EXPERTS_KEYS, *architecture.WITHOUT_TRAVELLERS, *TOKENS}
    for key in type(before).model_fields if type(before) is type(after) else ():
        was, now = getattr(before, key), getattr(after, key)
        if was != now and key not in changed_by_passes:
            note = f"is {now!r:.80}, expected {was!r:.80}: no pass changes it"
            yield _row(artifact, f"config.json: {key}", "none", Judged(None, None, False, note))


def _row(artifact: str, tensor: str, number_format: str, judged: Judged) -> AuditFacts:
    row: AuditFacts = {
        "artifact": artifact,
        "tensor": tensor,
        "format": number_format,
        "relative_error": judged.error,
        "expected_at_most": judged.most,
        "passed": judged.passed,
    }
    return row if judged.note is None else row | {"note": judged.note}


Siblings = Mapping[tuple[str, tuple[int, ...]], list[tuple[str, Weight]]]


def _siblings(ought: Mapping[str, Ought]) -> Siblings:
    """Tensors of one shape that stand together, such as the matrices of an expert: what may have been mixed up."""
    found: dict[tuple[str, tuple[int, ...]], list[tuple[str, Weight]]] = {}
    for name, known in ought.items():
        if known.weight is not None:
            found.setdefault((_home(name), known.weight.shape), []).append((name, known.weight))
    return found


def _home(name: str) -> str:
    """`model.layers.3.mamba.` of `model.layers.3.mamba.D`: what the number of an expert is counted in, too."""
    parts = name.split(".")[:-2]
    return ".".join(part for place, part in enumerate(parts) if place < 3 or not part.isdecimal())


def _judged(stored: Weight, models: Models, siblings: Siblings) -> Judged:
    """A tensor that was rounded must stand in a record, where there are any."""
    ought = models.ought.get(stored.name)
    if ought is None and not models.is_told:
        return Judged(None, None, True, "is not in the original; a pass does not tell what it did")
    if ought is None:
        return Judged(None, None, False, "is not in the original, and no pass says that it made it")
    if ought.weight is None:
        return Judged(None, None, True, "was made by a pass")
    if stored.shape != ought.weight.shape:
        return Judged(None, None, False, f"has shape {list(stored.shape)}, expected {list(ought.weight.shape)}")
    found = discrepancy.between(stored, ought.weight)
    if not math.isfinite(found.error):
        return Judged(None, None, False, "holds values that are not finite")
    if not ought.follows:
        return Judged(found.error, None, True, "was computed anew by a pass")
    if models.done and stored.is_quantized and ought.method is None and not ought.weight.is_quantized:
        return Judged(found.error, None, False, "is quantized, and no pass says that it rounded it")
    judged = _against_nearest(stored, ought, found)
    return judged if judged.passed else _named(judged, stored, siblings)


def _against_nearest(stored: Weight, ought: Ought, found: Discrepancy) -> Judged:
    assert ought.weight is not None
    if ought.method is None and stored.format == ought.weight.format:  # quantized or not, as it came
        kept = ought.weight.with_scales_in(stored.scale_dtype)
        return explained.cast(found, discrepancy.between(stored, kept), is_kept=True)
    rounded = nearest(stored, ought.weight)
    if not stored.is_quantized:
        return explained.cast(found, discrepancy.between(stored, rounded), is_kept=False)
    found_nearest, factors = discrepancy.between(rounded, ought.weight), explained.FACTORS[ought.method or "gptq"]
    return explained.rounded(found, found_nearest, factors, explained.roundoff(stored))


def _named(judged: Judged, stored: Weight, siblings: Siblings) -> Judged:
    """Whether what is there is what ought to be elsewhere; of a tensor that resembles what it ought to be that is not asked."""
    if judged.error is None or judged.error < ANOTHER:
        return judged
    most = judged.error / 2
    for name, other in siblings.get((_home(stored.name), stored.shape), ()):
        if name != stored.name and discrepancy.between(stored, other).error < most:
            return judged._replace(note=f"is what {name} ought to be")
    return judged
