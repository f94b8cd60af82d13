"""How far honest artifacts are from the bounds of the audit: the largest ratios to rounding to nearest, of docs/audit.md.

    python benchmarks/audit_margins.py ORIGINAL ARTIFACT...

For tensors by format and method: the relative error of the whole, of the worst row and of the worst column over that of rounding to
nearest (its own or the tensor's, whichever is more), and the gain's distance from 1 over the error. For layers: blocks, experts, and
the matrices of either.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from compress.check import discrepancy, layer_audit, layer_errors
from compress.check.audit import Models, nearest
from compress.check.layer_audit import LayerAuditFacts
from compress.runtime.artifacts import find_artifact, open_artifact


def of_tensors(models: Models) -> Iterator[tuple[str, tuple[float, ...]]]:
    """What kind it is, and the four ratios, of every quantized tensor that follows from the original."""
    for stored in models.candidate.weights:
        ought = models.ought.get(stored.name)
        if not stored.is_quantized or ought is None or ought.weight is None or not ought.follows:
            continue
        found = discrepancy.between(stored, ought.weight)
        rounded = discrepancy.between(nearest(stored, ought.weight), ought.weight)
        row, column = (
            float((errors / own.clamp_min(rounded.error)).max())
            for errors, own in ((found.by_row, rounded.by_row), (found.by_column, rounded.by_column))
        )
        yield (
            f"{stored.format}, {ought.method}",
            (found.error / rounded.error, row, column, abs(found.gain - 1) / found.error),
        )


def of_layer(row: LayerAuditFacts) -> tuple[str, float] | None:
    """What kind it is, and its error over that of rounding to nearest; None where no error is expected."""
    if (
        row["expected_at_most"] is None
        or row["relative_error"] is None
        or row["relative_error"] <= layer_errors.FLOAT_NOISE
    ):
        return None
    factors = {
        (False, False): ("block", layer_errors.BLOCK),
        (True, False): ("expert", layer_errors.EXPERT),
        (False, True): ("matrix", layer_errors.MATRIX),
        (True, True): ("matrix of an expert", layer_errors.MATRIX_OF_EXPERT),
    }
    kind, factor = factors[row["expert"] is not None, row["matrix"] is not None]
    return kind, row["relative_error"] * factor / (row["expected_at_most"] - layer_errors.FLOAT_NOISE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    arguments = parser.parse_args()
    original = open_artifact(find_artifact(arguments.original))
    tensors, layers = defaultdict[str, list](list), defaultdict[str, list](list)
    for path in arguments.artifacts:
        models = Models(original.model(), open_artifact(find_artifact(path)).model())
        for kind, ratios in of_tensors(models):
            tensors[kind].append(ratios)
        ids = layer_audit.tokens(original, 0)
        for row in layer_audit.audit(str(path), models, ids, "cpu", lambda _: None):
            if found := of_layer(row):
                layers[found[0]].append(found[1])
    print("| tensors | tensor | row | column | gain |\n|---|---|---|---|---|")
    for kind, found in tensors.items():
        print(f"| {kind} | " + " | ".join(f"{max(ratios):.3g}" for ratios in zip(*found, strict=True)) + " |")
    print("\n| layers | least | most |\n|---|---|---|")
    for kind, found in layers.items():
        print(f"| {kind} | {min(found):.2g} | {max(found):.3g} |")


if __name__ == "__main__":
    main()
