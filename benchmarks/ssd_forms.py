"""How to spell Mamba-2's recurrence in ONNX: `python benchmarks/ssd_forms.py`.

A `Scan` over tokens (`tokens`); a `Scan` over chunks of tokens, small matrices within (`chunks`, which ships, also with
other lengths of a chunk); and the same with all chunks at once and no `Scan`, the states by a matrix of decays
(`at once`). Layers side by side, since a graph computes once what follows from the length; batch 1; times a layer, the
least over rounds in which the forms take turns; the memory of each is what a process of its own takes for 512 tokens.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from machine import describe_machine

import exporters.graph.ssd as shipped
from exporters.graph.builder import Graph, WeightFile, declare, rename

SHAPES = {
    "tiny-nemotron-h": {"heads": 6, "head_dim": 64, "groups": 2, "d_state": 32},
    "Nemotron-3-Nano": {"heads": 64, "head_dim": 64, "groups": 8, "d_state": 128},
}
RUNS = {1: 100, 64: 10, 512: 3}  # tokens -> how often a form runs in a round
NAMES = ("x", "dt", "b", "c")
LAYERS, ROUNDS, LONGEST = 4, 12, max(RUNS)


def over_tokens(graph, x, dt, a, b, c, d, state, *, heads, head_dim, groups, d_state):
    """One decay a head is computed outside, so the body takes nothing but its inputs."""
    shared, rows = heads // groups, graph.reshape(x, 0, 0, heads, head_dim)
    added = graph.op("Mul", rows, graph.op("Unsqueeze", dt, graph.constant([3])))
    fed = [
        graph.reshape(graph.op("Exp", graph.op("Mul", dt, a(graph))), 0, 0, groups, shared, 1, 1),
        graph.reshape(added, 0, 0, groups, shared, 1, head_dim),
        graph.reshape(b, 0, 0, groups, 1, d_state, 1),
        graph.reshape(c, 0, 0, groups, 1, 1, d_state),
    ]
    step, state = graph.inner(), graph.reshape(state, 0, groups, shared, d_state, head_dim)
    shapes = [[shared, d_state, head_dim], [shared, 1, 1], [shared, 1, head_dim], [1, d_state, 1], [1, 1, d_state]]
    inputs = [declare(step.unique_name("step"), ir.DataType.FLOAT, ["B", groups, *shape]) for shape in shapes]
    h, decay, dtx, b, c = inputs
    following = step.op("Add", step.op("Mul", decay, h), step.op("Mul", b, dtx))
    body = step.finish(inputs, [following, step.op("MatMul", c, following)], "token")
    axes = {"num_scan_inputs": 4, "scan_input_axes": [1] * 4, "scan_output_axes": [1]}
    state, y = graph.several(2, "Scan", state, *fed, body=body, **axes)
    y = graph.op("Add", graph.reshape(y, 0, 0, heads, head_dim), graph.op("Mul", rows, graph.reshape(d, heads, 1)))
    return graph.reshape(y, 0, 0, heads * head_dim), graph.reshape(state, 0, heads, d_state, head_dim)


def at_once(graph, x, dt, a, b, c, d, state, *, heads, head_dim, groups, d_state):
    """All chunks as one batch [B, K]; the state before a chunk is the sum of what every chunk before it added, decayed."""
    shared, chunks = heads // groups, shipped.Chunks(graph, x)
    shapes = ((groups, shared, head_dim), (groups, shared, 1), (groups, 1, d_state), (groups, 1, d_state))
    xs, dts, bs, cs = (chunks.cut(value, shape) for value, shape in zip((x, dt, b, c), shapes, strict=True))
    by_head, sums = [0, 3, 4, 1, 2, 5], graph.constant(4)  # [B, G, R, K, L, ...]
    xs, dts, cs = (graph.op("Transpose", value, perm=by_head) for value in (xs, dts, cs))
    bs = graph.op("Transpose", bs, perm=[0, 3, 4, 1, 5, 2])
    steps = graph.op("Mul", dts, graph.reshape(a(graph), groups, shared, 1, 1, 1))
    xs = graph.op("Mul", xs, dts)
    start, end = (
        graph.op("Exp", graph.op("CumSum", steps, sums, **how)) for how in ({}, {"exclusive": 1, "reverse": 1})
    )
    between = graph.op("Exp", graph.op("CumSum", graph.op("Mul", steps, chunks.earlier()), sums))
    within = graph.op("Mul", graph.op("Trilu", graph.op("MatMul", cs, bs), upper=0), between)
    added = graph.op("MatMul", bs, graph.op("Mul", end, xs))  # [B, G, R, K, N, P]
    first = graph.reshape(state, 0, groups, shared, 1, d_state, head_dim)
    every = graph.reshape(graph.op("Concat", first, added, axis=3), 0, groups, shared, -1, d_state * head_dim)
    totals = graph.op("ReduceSum", steps, graph.constant([4]), keepdims=0)  # [B, G, R, K, 1]
    totals = graph.op("Pad", totals, graph.constant([0, 0, 0, 1, 0, 0, 0, 0, 0, 0]))
    size = graph.op("Shape", totals, start=3, end=4)
    square = graph.op("Concat", size, size, axis=0)
    ones = graph.op("ConstantOfShape", square, value=ir.tensor(np.ones(1, np.float32)))
    apart = graph.op("Mul", totals, graph.op("Trilu", ones, graph.constant(-1), upper=0))
    decays = graph.op("Trilu", graph.op("Exp", graph.op("CumSum", apart, graph.constant(3))), upper=0)
    states = graph.reshape(graph.op("MatMul", decays, every), 0, groups, shared, -1, d_state, head_dim)
    minus, zero, axis = graph.constant([-1]), graph.constant([0]), graph.constant([3])
    before = graph.op("Slice", states, zero, minus, axis)
    state = graph.op("Slice", states, minus, graph.constant([shipped.END]), axis)
    past = graph.op("Mul", start, graph.op("MatMul", cs, before))
    y = graph.op("Transpose", graph.op("Add", graph.op("MatMul", within, xs), past), perm=[0, 3, 4, 1, 2, 5])
    y = chunks.joined(y, x, heads * head_dim)
    y = graph.op("Add", y, graph.op("Mul", x, shipped.by_channel(graph, d, heads, head_dim)))
    return y, graph.reshape(state, 0, heads, d_state, head_dim)


def chunks_of(length: int):
    def form(*arguments, **sizes):
        shipped.CHUNK, before = length, shipped.CHUNK
        made = shipped.ssd(*arguments, **sizes)
        shipped.CHUNK = before
        return made

    return form


FORMS = {
    "tokens": over_tokens,
    "chunks of 64": shipped.ssd,
    "chunks of 32": chunks_of(32),
    "chunks of 128": chunks_of(128),
    "at once": at_once,
}


def write(form, sizes: dict[str, int], folder: Path) -> Path:
    """LAYERS layers that have nothing to do with each other, each with its own inputs."""
    folder.mkdir(parents=True)
    heads, head_dim, _, d_state = sizes.values()
    weights, random = WeightFile(folder / "model.onnx.data"), np.random.default_rng(0)
    graph, inputs, outputs = Graph(weights, 21), [], []
    for layer in range(LAYERS):
        shapes = {name: ["B", "S", width] for name, width in zip(NAMES, _widths(sizes), strict=True)}
        shapes["state"] = ["B", heads, d_state, head_dim]
        fed = [declare(f"{name}.{layer}", ir.DataType.FLOAT, shape) for name, shape in shapes.items()]
        a_log, d = (
            graph.stored(f"{name}.{layer}", torch.tensor(value.astype(np.float32)))
            for name, value in (("a_log", np.log(random.uniform(1, 16, heads))), ("d", random.normal(size=heads)))
        )
        x, dt, b, c, state = fed
        y, state = form(graph, x, dt, lambda g, a=a_log: g.op("Neg", g.op("Exp", a)), b, c, d, state, **sizes)
        inputs += fed
        outputs += [rename(y, f"y.{layer}", ir.DataType.FLOAT, shapes["x"])]
        outputs += [rename(state, f"new.{layer}", ir.DataType.FLOAT, shapes["state"])]
    weights.close()
    ir.save(ir.Model(graph.finish(inputs, outputs, "ssd"), ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"


def _widths(sizes: dict[str, int]) -> list[int]:
    """Channels of x, dt, b and c."""
    heads, head_dim, groups, d_state = sizes.values()
    return [heads * head_dim, heads, groups * d_state, groups * d_state]


def feeds(sizes: dict[str, int], length: int) -> dict[str, np.ndarray]:
    random, found = np.random.default_rng(length), {}
    heads, head_dim, _, d_state = sizes.values()
    for layer in range(LAYERS):
        for name, width in zip(NAMES, _widths(sizes), strict=True):
            value = random.normal(size=(1, length, width))
            found[f"{name}.{layer}"] = np.log1p(np.exp(value - 3)) if name == "dt" else value
        found[f"state.{layer}"] = random.normal(size=(1, heads, d_state, head_dim))
    return {name: value.astype(np.float32) for name, value in found.items()}


def session(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def times(sessions: dict[str, ort.InferenceSession], fed: dict[str, np.ndarray], runs: int) -> dict[str, float]:
    """The least, in microseconds a layer, forms in turn; they must agree before they are timed."""
    expected, *others = (one.run(None, fed) for one in sessions.values())
    for value, other in ((value, other[i]) for i, value in enumerate(expected) for other in others):
        np.testing.assert_allclose(other, value, atol=1e-5 * np.abs(value).max())
    found: dict[str, list[float]] = {name: [] for name in sessions}
    for _, (name, one) in itertools.product(range(ROUNDS), sessions.items()):
        for _ in range(runs):
            began = time.perf_counter()
            one.run(None, fed)
            found[name].append(1e6 * (time.perf_counter() - began) / LAYERS)
    return {name: round(min(values), 1) for name, values in found.items()}


def memory(path: Path, shape: str) -> float:
    """MiB that 512 tokens add to the peak of this process."""
    one, fed = session(path, 1), feeds(SHAPES[shape], LONGEST)
    before = _kib("VmRSS")
    one.run(None, fed)
    return round((_kib("VmHWM") - before) / 1024, 1)


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measured_apart(path: Path, shape: str) -> float:
    command = [sys.executable, __file__, "--memory", path, "--shape", shape]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(folder: Path) -> None:
    figures = {}
    for shape, sizes in SHAPES.items():
        paths = {name: write(form, sizes, folder / shape / name) for name, form in FORMS.items()}
        for threads in (1, 2):
            sessions = {name: session(path, threads) for name, path in paths.items()}
            for length, runs in RUNS.items():
                name = f"{shape}, threads: {threads}, tokens: {length}, microseconds a layer"
                figures[name] = times(sessions, feeds(sizes, length), runs)
        figures[f"{shape}, MiB for {LONGEST} tokens"] = {n: measured_apart(p, shape) for n, p in paths.items()}
        figures[f"{shape}, bytes of a layer"] = {n: p.stat().st_size // LAYERS for n, p in paths.items()}
    print(json.dumps({"machine": describe_machine(), "figures": figures}, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(memory(arguments.memory, arguments.shape))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
