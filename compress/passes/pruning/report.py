"""What `prune_experts` notes of a layer, and what the report says of the pass."""

from collections.abc import Iterable

from compress.passes import Coverage
from compress.strict.models import Strict

STEPS = {"pruned": "without the others", "rescaled": "rescaled", "stored": "as stored"}
ABOUT_LOSSES = "Losses are means over withheld calibration tokens of the squared error, as a share of what the layer leaves of the token."


class Loss(Strict):
    """Of a layer, on withheld tokens, after each step; None where it is not finite."""

    pruned: float | None
    rescaled: float | None = None
    stored: float | None


class LayerNote(Strict):
    """Of a layer that has experts. All are numbered as they came; `tokens` are those routed to each, `scale` multiplied all,
    `recovered` were corrected by least squares, `groups` merged into their first."""

    layer: int
    experts: int
    kept: list[int]
    tokens: list[int]
    dead: list[int]
    loss: Loss | None = None
    scale: float | None = None
    recovered: list[int] | None = None
    groups: list[list[int]] | None = None


class ExpertTokens(Strict):
    """Calibration tokens that reached an expert, as it was numbered."""

    layer: int
    expert: int
    tokens: int


class PruneDetails(Strict):
    """Layer by layer which experts stay, what every expert saw, and what the layer lost."""

    method: str
    router: str
    recovery: str
    experts_before: int
    experts_after: int
    layers: list[LayerNote]
    experts: list[ExpertTokens]
    experts_judged_on_few: list[ExpertTokens]


def details(method: str, router: str, recovery: str, layers: list[LayerNote], few: int) -> PruneDetails:
    """`few`: calibration tokens of an expert below which its figures are rough."""
    experts = [
        ExpertTokens(layer=entry.layer, expert=expert, tokens=tokens)
        for entry in layers
        for expert, tokens in enumerate(entry.tokens)
    ]
    return PruneDetails(
        method=method,
        router=router,
        recovery=recovery,
        experts_before=sum(entry.experts for entry in layers),
        experts_after=sum(len(entry.kept) for entry in layers),
        layers=layers,
        experts=experts,
        experts_judged_on_few=[entry for entry in experts if entry.tokens < few],
    )


def sentences(details: PruneDetails) -> list[str]:
    return [
        f"Method {details.method}. {details.experts_before} experts before, {details.experts_after} after; "
        f"router: {details.router}; recovery: {details.recovery}. {ABOUT_LOSSES}",
        *map(_layer, details.layers),
    ]


def coverage(details: PruneDetails, few: int) -> Coverage | None:
    if not details.experts:
        return None
    below = {f"layer {entry.layer} expert {entry.expert}" for entry in details.experts_judged_on_few}
    least = min(entry.tokens for entry in details.experts)
    loads = {entry.layer: entry.tokens for entry in details.layers}
    return Coverage(least, tuple(sorted(below)), f"saw fewer than {few} tokens, and were judged on those", loads)


def _layer(note: LayerNote) -> str:
    """Which experts stay, what the layer lost on withheld calibration tokens, what every expert saw."""
    if len(note.kept) == note.experts:
        return f"layer {note.layer} keeps all {note.experts} experts."
    text = f"layer {note.layer} keeps {_numbers(note.kept)} of {note.experts} experts; loss {_losses(note)}."
    if merged := [group for group in note.groups or () if len(group) > 1]:
        text += f" Merged into {'; '.join(f'{first}: {_numbers(others)}' for first, *others in merged)}."
    if note.recovered:
        text += f" Corrected: {_numbers(note.recovered)}."
    if note.dead:
        text += f" No calibration token reached {_numbers(note.dead)}."
    tokens = ", ".join(f"{count:,}" for count in note.tokens)
    return f"{text} Tokens of expert 0 to {note.experts - 1}, as they were numbered: {tokens}."


def _losses(note: LayerNote) -> str:
    steps = STEPS | ({"pruned": "merged"} if note.groups else {})
    found = note.loss.model_dump(exclude_unset=True) if note.loss else {}
    return ", ".join(f"{_figure(found[step])} {words}" for step, words in steps.items() if step in found)


def _figure(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.2g}"


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
