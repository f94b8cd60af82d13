"""Prunes one MoE layer: statistics, which experts stay, the layer without the others, corrections, and a note of it all."""

from compress.calibration.inputs import LayerInputs
from compress.model.weight import Unit
from compress.passes import Note
from compress.passes.prune_experts import KEEP_ROWS, Options
from compress.passes.pruning import merging, removal, scores
from compress.passes.pruning.correction import Correction
from compress.passes.pruning.reconstruction import Kept, Reconstruction, gates_of
from compress.passes.pruning.statistics import Statistics, collect
from compress.strict.json_text import Json


def prune(options: Options, unit: Unit, inputs: LayerInputs, count: int) -> tuple[Unit, Note]:
    """The unit with `count` experts, and what the report says of it."""
    statistics = collect(unit, inputs)
    kept = choose(options, statistics, count)
    if len(kept) == statistics.experts:
        return unit, _note(inputs, statistics, kept)
    pruned = removal.keep(unit, inputs, kept, keep_rows=options.router == KEEP_ROWS)
    stash = inputs.stash(pruned)
    if options.method == "merge":
        members = merging.groups(statistics.similarity(), kept)
        pruned = merging.merge(unit, pruned, inputs, members, _usage(options, statistics), stash)
    gates = gates_of(statistics, statistics.logits, kept, keep_rows=options.router == KEEP_ROWS)
    corrected, found = _correct(options, Correction(pruned, inputs, statistics, gates, stash), kept)
    note = _note(inputs, statistics, kept) | found
    return corrected, note | ({"groups": members} if options.method == "merge" else {})


def choose(options: Options, statistics: Statistics, count: int) -> Kept:
    """The experts that stay, ascending."""
    if count == statistics.experts:
        return tuple(range(count))
    if options.method in scores.NAMES:
        ranked = scores.of(options.method, statistics).argsort(descending=True, stable=True)
        return tuple(sorted(ranked[:count].tolist()))
    return Reconstruction(statistics, options.router).best(count)[0]


def _usage(options: Options, statistics: Statistics) -> list[float]:
    return scores.of(options.merge_weights, statistics).tolist()


def _correct(options: Options, correction: Correction, kept: Kept) -> tuple[Unit, dict[str, Json]]:
    """Rescaling and recovery as the options ask; losses are those on withheld tokens, the last one of the layer as it
    will be stored."""
    loss = {"pruned": correction.loss}
    found: dict[str, Json] = {"loss": loss}
    if options.router == "rescale":
        found["scale"] = correction.rescale()
        loss["rescaled"] = correction.loss
    if options.recovery != "none":
        found["recovered"] = [kept[position] for position in correction.recover(options.damping)]
    loss["stored"] = correction.stored_loss()
    return correction.unit, found


def _note(inputs: LayerInputs, statistics: Statistics, kept: Kept) -> dict[str, Json]:
    tokens = statistics.tokens
    return {
        "layer": inputs.index,
        "experts": statistics.experts,
        "kept": list(kept),
        "tokens": tokens,
        "dead": [e for e, count in enumerate(tokens) if count == 0],
    }
