"""How to spell Mamba's depthwise causal convolution in ONNX: `python benchmarks/conv_forms.py`.

`Conv` over [B, D, S] against the taps written out over [B, S, D], which is what ships; width 4, batch 1. 2,048 channels
are a Jamba's; 512 and 6,144 what Mamba-2 convolves (x, B and C together) in tiny-nemotron-h and Nemotron-3-Nano.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from machine import describe_machine

from exporters.graph.builder import Graph, WeightFile, declare, rename
from exporters.graph.mamba import causal_conv

CHANNELS, LENGTHS, WIDTH, REPEATS = (512, 2048, 6144), (1, 128), 4, 200


def conv_operator(graph, x, conv_state, real, weight, bias, width):
    """The same function with ONNX's Conv: two transposes around it."""
    padded = graph.op("Concat", conv_state, graph.op("Transpose", x, perm=[0, 2, 1]), axis=2)
    kernel = graph.op("Unsqueeze", graph.op("Transpose", weight, perm=[1, 0]), graph.constant([1]))
    y = graph.op("Conv", padded, kernel, bias, group=weight.shape[1])
    state = graph.op("Slice", padded, graph.constant([1 - width]), graph.constant([(1 << 63) - 1]), graph.constant([2]))
    return graph.op("Transpose", y, perm=[0, 2, 1]), state


def session(form, channels: int, folder: Path) -> ort.InferenceSession:
    weights = WeightFile(folder / "model.onnx.data")
    graph, random = Graph(weights, 21), np.random.default_rng(0)
    inputs = [
        declare("x", ir.DataType.FLOAT, ["B", "S", channels]),
        declare("conv_state", ir.DataType.FLOAT, ["B", channels, WIDTH - 1]),
        declare("real", ir.DataType.INT64, ["B", 1]),
    ]
    weight, bias = (
        graph.stored(name, torch.tensor(random.normal(size=shape), dtype=torch.float32))
        for name, shape in (("weight", (WIDTH, channels)), ("bias", channels))
    )
    y, state = form(graph, *inputs, weight, bias, WIDTH)
    outputs = [
        rename(y, "y", ir.DataType.FLOAT, ["B", "S", channels]),
        rename(state, "state", ir.DataType.FLOAT, ["B", channels, WIDTH - 1]),
    ]
    weights.close()
    ir.save(ir.Model(graph.finish(inputs, outputs, "conv"), ir_version=10), folder / "model.onnx")
    return ort.InferenceSession(folder / "model.onnx")


def microseconds(conv: ort.InferenceSession, feeds: dict) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        conv.run(None, feeds)
        times.append(time.perf_counter() - began)
    return 1e6 * statistics.median(times)


def measure(length: int, channels: int, sessions: dict[str, ort.InferenceSession]) -> dict[str, float]:
    """Both forms on the same input; they must agree before they are timed."""
    x = np.random.default_rng(length).normal(size=(1, length, channels)).astype(np.float32)
    feeds = {"x": x, "conv_state": np.ones((1, channels, WIDTH - 1), np.float32), "real": np.array([[length]])}
    outputs = [conv.run(None, feeds) for conv in sessions.values()]
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # float32 sums in another order
    return {name: round(microseconds(conv, feeds), 1) for name, conv in sessions.items()}


def main() -> None:
    figures = {}
    for channels in CHANNELS:
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            forms = {"Conv": (conv_operator, Path(first)), "taps": (causal_conv, Path(second))}
            sessions = {name: session(form, channels, folder) for name, (form, folder) in forms.items()}
            for length in LENGTHS:
                name = f"{channels} channels, {length} tokens, microseconds"
                figures[name] = measure(length, channels, sessions)
    print(json.dumps({"machine": describe_machine(), "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
