"""A budget of experts to remove, shared among layers so that the sum of their losses is least."""

Curve = dict[int, float]  # loss of a layer by the number of experts that stay


def allocate(curves: dict[int, Curve], experts: int, removed: int) -> dict[int, int]:
    """How many experts each layer keeps, `removed` being taken away in all; all layers have `experts`.

    Exact, by dynamic programming over layers: `best[r]` is the least loss of the layers so far with r experts removed, and
    the counts that give it. Losses need not be convex.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for curve in curves.values():
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for gone, (loss, counts) in best.items():
            for count, added in {experts: 0.0, **curve}.items():
                total = gone + experts - count
                candidate = (loss + added, (*counts, count))
                if total <= removed and (total not in following or candidate < following[total]):
                    following[total] = candidate
        best = following
    return dict(zip(curves, best[removed][1], strict=True))
