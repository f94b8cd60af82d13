"""How to spell a mixture of experts in ONNX: `python benchmarks/moe_forms.py [--folder FOLDER]`.

Exports the same random 1.6B int8 checkpoint three times: every expert on all tokens (`dense`), an `If` per expert whose
branch holds the expert's weights (`if`), and rows sorted and split by expert (`split`, the one that ships). Each is timed
in a process of its own under onnxruntime's defaults, forms interleaved.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from machine import describe_machine
from shapes import make

from exporters.dialects.portable import Portable
from exporters.graph import artifact, wiring
from exporters.graph.builder import WeightFile, width_of
from exporters.graph.stored import matrix

PROMPTS, DECODE, REPEATS = (128, 512), 32, 3


class Dense(Portable):
    """Every expert on every token, times a gate that is zero where it was not chosen."""

    def mixture(self, x, rows, router, experts, run):
        graph = self.graph
        logits = graph.op("MatMul", x, matrix(graph, self.weight(router.weight)))
        gates, chosen = _top_k(graph, logits, router)
        empty = graph.op("ConstantOfShape", graph.op("Shape", logits))
        spread = graph.op("ScatterElements", empty, chosen, gates, axis=-1)
        gate_of = (graph.op("Gather", spread, graph.constant([e]), axis=-1) for e in range(experts))
        return functools.reduce(self.add, (graph.op("Mul", run(e, rows), gate) for e, gate in enumerate(gate_of)))


class Branches(Portable):
    """An `If` per expert that gathers the rows routed to it; the branch owns the weights, or they would not fuse."""

    def mixture(self, x, rows, router, experts, run):
        graph, hidden, top_k = self.graph, self.weight(router.weight).shape[1], router.top_k
        tokens = graph.reshape(x, -1, hidden)
        logits = graph.op("MatMul", tokens, matrix(graph, self.weight(router.weight)))
        gates, chosen = _top_k(graph, logits, router)
        flat = graph.reshape(chosen, -1)
        pairs = [self._branch(tokens, flat, e, top_k, run) for e in range(experts)]
        results, places = (graph.op("Concat", *values, axis=0) for values in zip(*pairs, strict=True))
        shape = graph.op("Concat", graph.shape_of(flat, 0), graph.constant([hidden]), axis=0)
        slots, indices = graph.op("ConstantOfShape", shape), graph.op("Unsqueeze", places, graph.constant([1]))
        choices = graph.reshape(graph.op("ScatterND", slots, indices, results), -1, top_k, hidden)
        weighted = graph.op("MatMul", graph.op("Unsqueeze", gates, graph.constant([1])), choices)
        return graph.op("Reshape", weighted, graph.op("Shape", x))

    def _branch(self, rows, flat, number, top_k, run):
        """What one expert gives for the rows routed to it, and their places among all choices."""
        graph, run_graph, skip = self.graph, self.graph.inner(), self.graph.inner()
        places = graph.reshape(graph.op("NonZero", graph.op("Equal", flat, graph.constant(number))), -1)
        routed = graph.op("Greater", graph.op("Squeeze", graph.shape_of(places, 0)), graph.constant(0))
        mine = run_graph.op("Gather", rows, run_graph.op("Div", places, run_graph.constant(top_k)), axis=0)
        self.graph = run_graph  # the expert's operators go into the branch
        given = run(number, mine)
        self.graph = graph
        outputs = [given, skip.op("ConstantOfShape", skip.constant([0, width_of(given)]))]
        for value in outputs:
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, width_of(given)])
        branches = {
            "then_branch": run_graph.finish([], outputs[:1], f"expert_{number}"),
            "else_branch": skip.finish([], outputs[1:], f"no_{number}"),
        }
        return graph.op("If", routed, **branches), places


def _top_k(graph, logits, router):
    probabilities = graph.op("Softmax", logits, axis=-1)
    return graph.several(2, "TopK", probabilities, graph.constant([router.top_k]), axis=-1)


FORMS = {"dense": Dense, "if": Branches, "split": Portable}


def export_forms(source: Path, folder: Path) -> None:
    """checkpoint -> int8 checkpoint -> one ONNX folder per form."""
    from compress.apply import pipeline
    from compress.checkpoint.reader import Checkpoint
    from compress.recipe.recipe import load_recipe
    from compress.recipe.source import resolve

    recipe = load_recipe("tiny-int8", ("check=null", "export=[]"))
    pipeline.apply(pipeline.Job(recipe, resolve(str(source)), folder / "int8", overwrite=True))
    checkpoint = Checkpoint(folder / "int8" / "checkpoint", allow_quantized=True)
    for name, form in FORMS.items():
        (folder / f"form-{name}").mkdir(parents=True)
        weights = WeightFile(folder / f"form-{name}" / "model.onnx.data")
        graph = wiring.build(checkpoint.model, form, weights, lambda _: None)
        weights.close()
        artifact.save(graph, checkpoint.config, folder / f"form-{name}" / "model.onnx")


def time_form(path: Path) -> dict:
    """Load, prefill and decode of one exported folder, in this process."""
    from compress.runtime.onnx_session import OnnxSession

    began = time.perf_counter()
    session = OnnxSession(path / "model.onnx")
    figures = {"load_s": time.perf_counter() - began, "rss_gib": _rss_gib()}
    ids = np.random.default_rng(0).integers(3, session.vocab_size, (1, max(PROMPTS)))
    for length in PROMPTS:
        generation = session.start(1)
        began = time.perf_counter()
        generation.step(ids[:, :length])
        figures[f"prefill_{length}_s"] = time.perf_counter() - began
    generation = session.start(1)
    generation.step(ids[:, :1])
    began = time.perf_counter()
    for t in range(DECODE):
        generation.step(ids[:, t : t + 1])
    return figures | {"decode_ms": 1000 * (time.perf_counter() - began) / DECODE, "peak_gib": _peak_gib()}


def _rss_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(folder: Path) -> None:
    if not all((folder / f"form-{name}").is_dir() for name in FORMS):
        export_forms(make("moe-1.6b", folder / "moe-1.6b"), folder)
    runs: dict[str, list[dict]] = {name: [] for name in FORMS}
    for _ in range(REPEATS):
        for name in FORMS:
            command = [sys.executable, __file__, "--time", folder / f"form-{name}"]
            runs[name].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    medians = {
        name: {key: round(statistics.median(r[key] for r in found), 3) for key in found[0]}
        for name, found in runs.items()
    }
    print(json.dumps({"machine": describe_machine(), "forms": medians}, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="Where to keep the exports; default a temporary folder.")
    parser.add_argument("--time", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.time:
        print(json.dumps(time_form(arguments.time)))
    elif arguments.folder:
        main(arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
