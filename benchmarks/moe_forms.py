"""How to spell a mixture of experts in ONNX: `python benchmarks/moe_forms.py [--folder FOLDER]`.

Exports the same random 1.6B int8 checkpoint three times: every expert on all tokens (`dense`), an `If` per expert whose
branch holds the expert's weights (`if`), and rows sorted and split by expert (`split`, the one that ships). Each is timed
in a process of its own under onnxruntime's defaults, forms interleaved.
"""

import argparse
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

from exporters.graph.blocks import swiglu

PROMPTS, DECODE, REPEATS = (128, 512), 32, 3


def moe_dense(graph, x, router, experts, top_k, hidden):
    """Every expert on every token, times a gate that is zero where it was not chosen."""
    logits = graph.op("MatMul", x, router)
    gates, chosen = graph.op("TopK", graph.op("Softmax", logits, axis=-1), graph.constant([top_k]), outputs=2, axis=-1)
    empty = graph.op("ConstantOfShape", graph.op("Shape", logits))
    spread = graph.op("ScatterElements", empty, chosen, gates, axis=-1)
    total = None
    for number, expert in enumerate(experts):
        gate = graph.op("Gather", spread, graph.constant([number]), axis=-1)
        term = graph.op("Mul", swiglu(graph, x, *expert), gate)
        total = term if total is None else graph.op("Add", total, term)
    return total


def moe_if(graph, x, router, experts, top_k, hidden):
    """An `If` per expert that gathers the rows routed to it; the branch owns the weights, or they would not fuse."""
    rows = graph.reshape(x, -1, hidden)
    probabilities = graph.op("Softmax", graph.op("MatMul", rows, router), axis=-1)
    gates, chosen = graph.op("TopK", probabilities, graph.constant([top_k]), outputs=2, axis=-1)
    flat = graph.reshape(chosen, -1)
    pairs = [_if_expert(graph, rows, flat, number, expert, top_k, hidden) for number, expert in enumerate(experts)]
    results = graph.op("Concat", *(result for result, _ in pairs), axis=0)
    places = graph.op("Concat", *(place for _, place in pairs), axis=0)
    slots = graph.op("ConstantOfShape", graph.op("Concat", graph.shape_of(flat, 0), graph.constant([hidden]), axis=0))
    filled = graph.op("ScatterND", slots, graph.op("Unsqueeze", places, graph.constant([1])), results)
    weighted = graph.op(
        "MatMul", graph.op("Unsqueeze", gates, graph.constant([1])), graph.reshape(filled, -1, top_k, hidden)
    )
    return graph.op("Reshape", weighted, graph.op("Shape", x))


def _if_expert(graph, rows, flat, number, expert, top_k, hidden):
    places = graph.reshape(graph.op("NonZero", graph.op("Equal", flat, graph.constant(number))), -1)
    routed = graph.op("Greater", graph.op("Squeeze", graph.shape_of(places, 0)), graph.constant(0))
    run, skip = graph.body(), graph.body()
    mine = run.op("Gather", rows, run.op("Div", places, run.constant(top_k)), axis=0)
    outputs = [swiglu(run, mine, *expert), skip.op("ConstantOfShape", skip.constant([0, hidden]))]
    for value in outputs:
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, hidden])
    branches = {
        "then_branch": run.finish([], outputs[:1], f"expert_{number}"),
        "else_branch": skip.finish([], outputs[1:], f"no_{number}"),
    }
    return graph.op("If", routed, **branches), places


FORMS = {"dense": moe_dense, "if": moe_if, "split": None}


def export_forms(folder: Path) -> None:
    """checkpoint -> int8 checkpoint -> one ONNX folder per form."""
    import exporters.architectures.jamba as wiring
    from compress.apply import exporting, pipeline
    from compress.recipe.recipe import load_recipe
    from compress.recipe.source import resolve

    source = make("moe-1.6b", folder / "moe-1.6b")
    recipe = load_recipe("tiny-int8", ("check=null", "export=[]"))
    pipeline.apply(pipeline.Job(recipe, resolve(str(source)), folder / "int8", overwrite=True))
    shipped = wiring.moe
    for name, form in FORMS.items():
        wiring.moe = form or shipped
        exporting.export_checkpoint(folder / "int8" / "checkpoint", "onnx", folder / f"form-{name}")
    wiring.moe = shipped


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
        export_forms(folder)
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
