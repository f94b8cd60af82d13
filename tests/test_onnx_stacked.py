"""A weight stacked from those of all experts is written an expert at a time, and is in the file what its pieces are."""

import gc
import weakref

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from compress.model.roles import Role
from compress.model.weight import Weight
from exporters.graph import artifact
from exporters.graph.builder import Graph, WeightFile, declare, rename
from exporters.graph.stored import stacked, widened

EXPERTS, ROWS, COLUMNS = 5, 6, 4


class Experts:
    """Weights that are made when they are loaded; `most` counts how many were in memory together."""

    def __init__(self, dtype: torch.dtype, name: str):
        self.expected = torch.randn(EXPERTS, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.most, self._held = 0, weakref.WeakSet()
        self.weights = [
            Weight(f"expert {e}", Role.EXPERTS, (ROWS, COLUMNS), name, lambda rows, e=e: self._load(e))
            for e in range(EXPERTS)
        ]

    def _load(self, expert: int) -> torch.Tensor:
        gc.collect()
        tensor = self.expected[expert].clone()
        self._held.add(tensor)
        self.most = max(self.most, len(self._held))
        return tensor


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_experts_are_stacked_one_at_a_time(tmp_path, name, dtype):
    experts, file = Experts(dtype, name), WeightFile(tmp_path / "model.onnx.data")
    graph, number = Graph(file, 21), declare("number", ir.DataType.INT64, [])
    whole = widened(graph, stacked(graph, "experts", experts.weights))
    y = rename(graph.op("Gather", whole, number, axis=0), "y", ir.DataType.FLOAT, [COLUMNS, ROWS])
    file.close()
    artifact.save(graph.finish([number], [y], "test"), {}, tmp_path / "model.onnx")
    assert experts.most == 1
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for e in range(EXPERTS):
        (actual,) = session.run(None, {"number": np.array(e)})
        assert np.array_equal(actual, experts.expected[e].T.float().numpy())


def test_a_large_stack_begins_on_a_page_though_its_pieces_are_small(tmp_path):
    file = WeightFile(tmp_path / "data")
    file.add("first", torch.ones(3), ir.DataType.FLOAT, (3,))
    pieces = (torch.full((64, 1024), float(e)) for e in range(4))
    stack = file.add_pieces("stack", pieces, ir.DataType.FLOAT, (4, 64, 1024))
    file.close()
    assert (stack.offset, stack.length) == (4096, 1 << 20)
    assert np.array_equal(stack.numpy()[:, 0, 0], [0, 1, 2, 3])


@pytest.mark.parametrize("count", [1, 3])
def test_pieces_that_are_not_the_whole_are_refused(tmp_path, count):
    file = WeightFile(tmp_path / "data")
    with pytest.raises(ValueError, match="'stack'"):
        file.add_pieces("stack", [torch.ones(4, 4)] * count, ir.DataType.FLOAT, (2, 4, 4))
