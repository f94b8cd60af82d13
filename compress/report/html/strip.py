"""How every layer is stored, as a strip: layers across, roles down, coloured by bits per weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from compress.model.architecture import Architecture
from compress.model.weight import Unit, Weight
from compress.report.html import heat
from compress.report.html.heat import Cell, Heat

MOST_BITS, FEWEST_BITS = 16, 4  # the ends of the colours
SHORT = {"mamba": "M", "mamba2": "M2", "attention": "A", "moe": "E", "mlp": "F"}


@dataclass
class Stored:
    """The tensors of one role in one unit. Formats with how many tensors have each."""

    parameters: int = 0
    bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)

    def add(self, weight: Weight) -> None:
        self.parameters += weight.parameters
        self.bytes += weight.stored_bytes()
        self.formats[weight.format] = self.formats.get(weight.format, 0) + 1

    @property
    def bits(self) -> float:
        """Per weight, scales included."""
        return 8 * self.bytes / max(self.parameters, 1)


def strip(architecture: Architecture, units: Sequence[Unit]) -> Heat:
    """Matrices and all else that is stored, by role in the order of the model."""
    columns = {unit.name: _short(unit.name) for unit in units}
    stored: dict[tuple[str, str], Stored] = {}
    for unit in units:
        for weight in unit.weights.values():
            stored.setdefault((str(weight.role), unit.name), Stored()).add(weight)
    cells = {(role, columns[unit]): _cell(role, unit, found) for (role, unit), found in stored.items()}
    roles = dict.fromkeys((role for role, _ in stored), "")
    kinds = [kinds_of(architecture).get(unit.name, "") for unit in units]
    return heat.grid("Bits per weight", cells, roles, list(columns.values()), kinds, _legend())


def kinds_of(architecture: Architecture) -> dict[str, str]:
    """What each layer does, by the name of its unit: its mixer, and whether it routes to experts."""
    return {
        f"layer.{layer.index}": "+".join(_letters([block.kind for block in layer.blocks]))
        for layer in architecture.layers
    }


def _letters(kinds: Sequence[str]) -> Iterator[str]:
    return (SHORT.get(kind, kind) for kind in kinds)


def _short(unit: str) -> str:
    return {"embedding": "emb"}.get(unit, unit.removeprefix("layer."))


def _cell(role: str, unit: str, found: Stored) -> Cell:
    share = (found.bits - FEWEST_BITS) / (MOST_BITS - FEWEST_BITS)
    formats = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in sorted(found.formats.items()))
    words = f"{unit}, {role}: {formats}; {found.bits:.2f} bits per weight, {found.bytes:,} bytes"
    return heat.cell(f"{found.bits:.3g}", share, heat.BLUES, words)


def _legend() -> list[Cell]:
    return [
        heat.cell(f"{bits} bits", (bits - FEWEST_BITS) / (MOST_BITS - FEWEST_BITS), heat.BLUES)
        for bits in (4, 6, 8, 12, 16)
    ]
