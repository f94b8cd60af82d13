"""What a run wrote, as tables: artifacts, and what a sequence takes of memory."""

from compress.model.sizes import StateFacts
from compress.output_folder.build_facts import BuildFacts
from compress.report.schema import Report
from compress.report.tables import Table


def artifacts(report: Report) -> Table:
    head = ("kind", "path", "bytes", "of which not weights", "bits per weight")
    rows = [
        [
            facts["kind"],
            facts["path"],
            f"{facts['bytes']:,}",
            f"{facts['graph_bytes']:,}",
            f"{facts['bits_per_weight']:.2f}",
        ]
        for facts in report["artifacts"]
    ]
    return Table("Artifacts, and what loads them", head, rows)


def engines(report: Report) -> Table:
    """What was built of a graph."""
    head = ("artifact", "engine", "builder", "seconds", "peak memory", "bytes", "of which weights", "by arithmetic",
            "activations", "quantized tensors", "widened")  # fmt: skip
    built = [(artifact["kind"], artifact["build"]) for artifact in report["artifacts"] if "build" in artifact]
    rows = [[kind, *_engine(facts)] for kind, facts in built if facts["engine"] is not None]
    return Table("Engines", head, rows)


def _engine(facts: BuildFacts) -> list[str]:
    sizes = (
        facts["peak_rss_bytes"], facts["engine_bytes"], facts["engine_weight_bytes"], facts["expected_weight_bytes"],
        facts["activation_bytes"],
    )  # fmt: skip
    builder, layers = f"{facts['builder']} {facts['version']}", facts["layers"]
    seconds = "" if facts["seconds"] is None else f"{facts['seconds']:.1f}"
    known = ["" if size is None else f"{size:,}" for size in sizes]
    return [str(facts["engine"]), builder, seconds, *known, str(len(layers)), str(len(facts["widened"]))]


def states(report: Report) -> Table:
    """What a sequence takes, where states are kept in formats of their own."""
    before, after = report["state_memory"]["baseline"], report["state_memory"]["candidate"]
    contexts = list(after["total"]["at"])
    head = ("", "kept as", *(f"bytes at {int(tokens) // 1024}K tokens" for tokens in contexts))
    rows = [
        [kind, _formats(report, kind), *(f"{before[kind]['at'][at]:,} -> {after[kind]['at'][at]:,}" for at in contexts)]
        for kind in after
    ]
    return Table("States of a sequence", head, rows if report["states"] else [])


def _formats(report: Report, kind: str) -> str:
    """Those in which layers keep a kind of state."""
    rows = [row for row in report["states"] if row["kind"] == kind]
    return ", ".join(dict.fromkeys(map(_format, rows)))


def _format(row: StateFacts) -> str:
    """Such as `int8 + int8 every 4 tokens`, the second being what rounding loses."""
    words = [row["format"], "stochastic" if row["rounding"] == "stochastic" else ""]
    words += [
        f"+ {row['residual']}" if "residual" in row else "",
        f"every {row['every']} tokens" if row["every"] > 1 else "",
    ]
    return " ".join(filter(None, words))
