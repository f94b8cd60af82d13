"""Two dialects in a few lines each: one with onnxruntime's own operators, one whose hidden states are float16."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_graphs import Steps, all_graphs, run_graph, wired
from stepping import own_logits

from compress import formats
from compress.checkpoint.reader import Checkpoint
from compress.formats.activations import NAMES as ACTIVATIONS
from compress.formats.activations import Activation
from compress.model.roles import Role
from compress.model.weight import Weight
from exporters.dialects.portable import Portable
from exporters.graph.linear import linear
from exporters.graph.stored import plain

LENGTH, PROMPT = 40, 32
CONTRIB = "com.microsoft"


class Fused(Portable):
    """A sum and the norm of it are one operator, silu is another."""

    domains: ClassVar[Mapping[str, int]] = {CONTRIB: 1}

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """Waits for the norm that takes it; a sum that no norm takes is added where it is used."""
        total = super().add(a, b)
        total.meta["terms"] = (a, b)
        return total

    def rms_norm(self, x: ir.Value, name: str, eps: float, groups: int = 1) -> ir.Value:
        if "terms" not in x.meta or groups > 1:
            return super().rms_norm(x, name, eps, groups)
        weight = plain(self.graph, self.weight(name))
        return self.graph.op(f"{CONTRIB}::SkipSimplifiedLayerNormalization", *x.meta["terms"], weight, epsilon=eps)

    def silu(self, x: ir.Value) -> ir.Value:
        return self.graph.op(f"{CONTRIB}::QuickGelu", x, alpha=1.0)


class Half(Portable):
    """float16 throughout, but where sums are long: norms, scans and routers stay in float32."""

    body_type: ClassVar[ir.DataType] = ir.DataType.FLOAT16


@pytest.fixture(scope="module", params=["bf16", "int8"])
def model(request, tiny, applied):
    return Checkpoint(tiny if request.param == "bf16" else applied / "checkpoint", allow_quantized=True).model


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 2048, (2, LENGTH))


@pytest.fixture(scope="module")
def expected(model, ids) -> np.ndarray:
    return own_logits(model, torch.from_numpy(ids), [LENGTH]).numpy()


def logits_of(path, ids: np.ndarray) -> np.ndarray:
    """A prompt, then token by token."""
    steps, mask = Steps(path), np.ones_like(ids)
    pieces = np.split(ids, range(PROMPT, LENGTH), axis=1)
    return np.concatenate([steps.step(piece, mask[:, :end]) for end, piece in enumerate(pieces, PROMPT)], 1)


def nodes_of(path) -> list[onnx.NodeProto]:
    return [node for graph in all_graphs(onnx.load(path, load_external_data=False).graph) for node in graph.node]


def test_a_dialect_of_onnxruntimes_operators_agrees(model, tmp_path, ids, expected):
    path = wired(model, tmp_path / "fused", dialect=Fused)
    assert np.abs(logits_of(path, ids) - expected).max() <= 1e-3
    kinds = [node.op_type for node in nodes_of(path) if node.domain == CONTRIB]
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * len(
        model.layers
    )  # all norms of the stream but the first
    versions = {entry.domain: entry.version for entry in onnx.load(path, load_external_data=False).opset_import}
    assert versions == {"": 21, CONTRIB: 1}


def test_a_dialect_of_float16_agrees_as_far_as_float16_goes(model, tmp_path, ids, expected):
    """Few tokens may go to another expert, where two are all but equal: half of them are within a few roundings of 2^-11."""
    path = wired(model, tmp_path / "half", dialect=Half)
    actual = logits_of(path, ids)
    assert np.median(np.abs(actual - expected).max(-1)) <= 2**-7 * np.abs(expected).max()
    assert (actual.argmax(-1) == expected.argmax(-1)).mean() > 0.9
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    products = [types[node.output[0]] for node in inferred.node if node.op_type == "MatMul" and node.output[0] in types]
    assert products and set(products) == {onnx.TensorProto.FLOAT16}


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("number_format", ["int8", "int8-tensor", "int4-g32", "fp8-e4m3-b128"])
def test_every_way_to_store_and_to_round_works_in_float16(tmp_path, number_format, activation):
    g = torch.Generator().manual_seed(0)
    stored = formats.get(number_format).quantize(torch.randn(24, 64, generator=g))
    scale = (lambda: 0.25) if activation and activation.startswith("static") else None
    weight = Weight("w", Role.MLP, (24, 64), number_format, lambda rows=None: stored)
    weight = replace(weight, activation=activation and Activation(activation, scale), rotation=8)
    x = torch.randn(3, 64, generator=g).half()

    def build(graph, value):
        return graph.float32(linear(graph, value, weight))

    actual = run_graph(tmp_path, {"x": x.numpy()}, 24, build, graph=Half.new_graph)
    expected = torch.nn.functional.linear(weight.rounded_input(x.float()), weight.dense())
    # a rotated input is off by 2^-11, which may turn a rounding: a step of its grid, beside a column of the matrix
    bound = 0.02 * expected.abs().max() + (0 if activation is None else 0.3)
    assert np.abs(actual - expected.numpy()).max() <= bound


def test_an_operator_of_a_domain_without_a_version_is_refused(model, tmp_path):
    class Unstated(Fused):
        domains: ClassVar[Mapping[str, int]] = {}

    with pytest.raises(ValueError, match=CONTRIB):
        wired(model, tmp_path / "unstated", dialect=Unstated)
