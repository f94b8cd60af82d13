"""What build.json has of the range of fp16: the largest number of every unit of a model on calibration text, and which units are
kept in a wider type."""

from typing import TypedDict


class UnitRange(TypedDict):
    """`unit` is embedding, layer.N or head; `where` its largest magnitude occurs; `why` it is not in fp16, or None."""

    unit: str
    largest: float
    where: str
    type: str
    why: str | None


class OverflowFacts(TypedDict):
    """Magnitudes up to `limit` stay in fp16; `tokens` of text were looked at."""

    limit: float
    tokens: int
    units: list[UnitRange]


def called(unit: str) -> str:
    """A unit in a sentence: layer 3, the embedding, the head."""
    return unit.replace(".", " ") if unit.startswith("layer.") else f"the {unit}"


def sentence(facts: OverflowFacts) -> str:
    """What a report says of it."""
    most = max(facts["units"], key=lambda unit: unit["largest"])
    found = (
        f"the largest number on {facts['tokens']:,} calibration tokens is {most['largest']:,.7g}, in {called(most['unit'])}, "
        f"of {facts['limit']:,.0f} that fp16 holds with room to spare"
    )
    wide = [unit for unit in facts["units"] if unit["why"]]
    if not wide:
        return found
    kinds = " or ".join(sorted({unit["type"] for unit in wide}))
    return f"{found}; in {kinds} instead: {', '.join(called(unit['unit']) for unit in wide)}"
