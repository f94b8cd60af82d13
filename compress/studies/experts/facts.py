"""What table and page both say of a survey."""

from compress.passes.prune_experts import FEW_TOKENS
from compress.studies.experts.findings import Layer, Survey


def most_similar(layer: Layer) -> tuple[int, int, float]:
    """The two experts whose outputs are most alike, and the cosine."""
    matrix, experts = layer["similarity"], range(layer["experts"])
    first, second = max(((a, b) for a in experts for b in experts if a < b), key=lambda pair: matrix[pair[0]][pair[1]])
    return first, second, matrix[first][second]


def likest(layer: Layer, expert: int) -> tuple[int, float]:
    """The other expert that is most like one, and the cosine."""
    row = layer["similarity"][expert]
    other = max((e for e in range(layer["experts"]) if e != expert), key=row.__getitem__)
    return other, row[other]


def by_load(layer: Layer) -> list[int]:
    """The experts of a layer, the least used first."""
    return sorted(range(layer["experts"]), key=layer["tokens"].__getitem__)


def percent(share: float) -> str:
    """A share of all tokens; what is not zero never looks like it."""
    if share == 0:
        return "0 %"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "<0.1 %"


def warnings(result: Survey) -> list[str]:
    """Sentences on what to be careful with."""
    rough = sum(count < FEW_TOKENS for layer in result["layers"] for count in layer["tokens"])
    if not rough:
        return []
    experts = "1 expert" if rough == 1 else f"{rough} experts"
    return [f"{experts} saw fewer than {FEW_TOKENS} tokens: figures about {'it' if rough == 1 else 'them'} are rough"]
