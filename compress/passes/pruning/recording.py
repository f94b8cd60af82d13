"""What pruning did to the tensors of a layer, for config.json."""

from collections.abc import Iterator

from compress.model.hybrid import HybridModel
from compress.model.records import Change, Kept, Recomputed, Rows, Scaled
from compress.model.tensor_names import in_short
from compress.passes._prune_report import LayerNote
from compress.passes.prune_experts import KEEP_ROWS
from compress.passes.pruning.correction import DOWN
from compress.passes.pruning.reconstruction import router_order


def of_layer(note: LayerNote, model: HybridModel, router: str) -> Iterator[Change]:
    """Nothing where all experts stayed. `model` is the pruned one."""
    if len(note.kept) == note.experts:
        return
    architecture, prefix = model.architecture, model.architecture.layer_prefix(note.layer)
    down = [prefix + architecture.expert_prefix(expert) + DOWN for expert in range(len(note.kept))]
    stem = prefix + architecture.expert_prefix(0).removesuffix("0.")
    merged = [group for group in note.groups or () if len(group) > 1]
    yield Kept(stem=stem, sources=note.kept, merged=merged or None)
    rows = router_order(note.kept, note.experts, keep_rows=router == KEEP_ROWS)
    yield Rows(tensors=(prefix + architecture.ROUTER,), rows=rows)
    if note.scale not in (None, 1.0):
        yield Scaled(tensors=in_short(down), factor=note.scale)
    if recovered := [down[note.kept.index(expert)] for expert in note.recovered or ()]:
        yield Recomputed(tensors=in_short(recovered), by="least_squares")
