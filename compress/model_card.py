"""README.md of a compressed checkpoint: the source's model card with a section on how it was compressed."""

from collections import Counter
from pathlib import Path

import compress
from compress.checkpoint import companions
from compress.escaping import code, code_block, markdown
from compress.model import Unit

HEADING = "## How this model was compressed"


def render(source_folder: Path, source_name: str, units: tuple[Unit, ...], facts: list[str], recipe_text: str) -> str:
    """The card's text; `facts` are sentences on what else changed. A source without a card gets a one-line one."""
    card = source_folder / companions.CARD
    original = (
        card.read_text(encoding="utf-8", errors="replace").rstrip()
        if card.is_file() and companions.may_travel(card)
        else f"# {markdown(source_name)}, compressed"
    )
    counts = Counter(weight.format for unit in units for weight in unit.weights.values())
    stored = ", ".join(f"{number} tensors as {name}" for name, number in sorted(counts.items()))
    return (
        f"{original}\n\n{HEADING}\n\n"
        f"Made from {code(source_name)} by compress {compress.__version__}: {stored}. "
        f"{''.join(fact + ' ' for fact in facts)}"
        "What is said above, figures included, is of the original.\n\n"
        f"The recipe, with every default written out:\n\n{code_block(recipe_text, 'yaml')}\n"
    )
