"""What pruning did to the tensors of a layer, for config.json."""

from collections.abc import Iterator

from compress.model.hybrid import HybridModel
from compress.model.records import Change, Kept, Recomputed, Rows, Scaled
from compress.model.tensor_names import in_short
from compress.passes.prune_experts import KEEP_ROWS
from compress.passes.pruning.reconstruction import router_order
from compress.passes.pruning.report import LayerNote


def of_layer(note: LayerNote, model: HybridModel, router: str) -> Iterator[Change]:
    """Nothing where all experts stayed. `model` is the pruned one."""
    layer = model.layer(note.layer)
    if layer.experts is None or len(note.kept) == note.experts:
        return
    experts, kept = layer.experts, tuple(note.kept)
    merged = tuple(tuple(group) for group in note.groups or () if len(group) > 1)
    yield Kept(stem=layer.prefix + experts.prefix(0).removesuffix("0."), sources=kept, merged=merged or None)
    order = router_order(kept, note.experts, keep_rows=router == KEEP_ROWS)
    yield Rows(tensors=(layer.prefix + experts.router.weight,), rows=tuple(order))
    if experts.router.bias:
        yield Rows(tensors=(layer.prefix + experts.router.bias,), rows=kept)
    outputs = [layer.prefix + experts.prefix(expert) + experts.parts[-1] for expert in range(len(kept))]
    if note.scale not in (None, 1.0):
        yield Scaled(tensors=in_short(outputs), factor=note.scale)
    if recovered := [outputs[kept.index(expert)] for expert in note.recovered or ()]:
        yield Recomputed(tensors=in_short(recovered), by="least_squares")
