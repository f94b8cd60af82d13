"""What the report tells of a pass: in its own words, and as it is where it has none."""

from dataclasses import dataclass

from compress.passes import Details, Pass
from compress.report.schema import PassFacts
from compress.strict import yaml_text
from compress.strict.json_text import Json
from compress.strict.models import Strict
from compress.strict.plain import plain
from compress.terminal.escaping import code_block, markdown

MOST_ITEMS = 12  # of a list or a mapping that report.md shows as it is


@dataclass(frozen=True)
class PassDone:
    """A pass as it was done. `notes` are sentences on what its options meant for this model."""

    name: str
    step: Pass[Strict]
    seconds: float
    peak_rss_bytes: int
    details: Details
    notes: tuple[str, ...]
    layers_reused: int

    def to_json(self) -> PassFacts:
        """The pass's own words win where it uses a name of ours."""
        ours = {"layers_reused": self.layers_reused} | ({"notes": list(self.notes)} if self.notes else {})
        theirs = {str(key): plain(value) for key, value in self.details.items()}
        return {
            "name": self.name,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "details": {**theirs, **{key: value for key, value in ours.items() if key not in theirs}},
        }

    def lines(self) -> list[str]:
        """For report.md, as items of a list: what the pass says, and of its details what it does not."""
        said = self.step.sentences(self.details)
        first, *others = [said] if isinstance(said, str) else said or [""]
        notes = [f"Note: {markdown(note)}." for note in self.notes]
        beside = " ".join(part for part in (first, *notes) if part)
        head = f"- {self.name}: {self.seconds:.1f} s, peak {self.peak_rss_bytes / 2**20:.0f} MiB. {beside}".rstrip()
        return [head, *(f"  - {line}" for line in others), *self._unsaid()]

    def _unsaid(self) -> list[str]:
        rest = {key: _shortened(plain(value)) for key, value in self.details.items() if key not in self.step.spoken_for}
        if not rest:
            return []
        block = code_block(yaml_text.dump(plain(rest)), "yaml")
        return ["", *(f"  {line}" for line in block.splitlines()), ""]


def _shortened(value: Json) -> Json:
    """With the first items of what has many; report.json has all."""
    if isinstance(value, dict):
        shown = {key: _shortened(item) for key, item in list(value.items())[:MOST_ITEMS]}
        return shown | ({"and more": _left_out(len(value))} if len(value) > MOST_ITEMS else {})
    if isinstance(value, list):
        items = [_shortened(item) for item in value[:MOST_ITEMS]]
        return items + ([f"and {_left_out(len(value))}"] if len(value) > MOST_ITEMS else [])
    return value


def _left_out(count: int) -> str:
    return f"{count - MOST_ITEMS} more, in report.json"
