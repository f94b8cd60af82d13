"""Experts in graphs for TensorRT: multiplied together or gathered, as our own operators have them; written one at a time; read back
by their own names."""

from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx_graphs import EXACT, all_graphs, make_session, run_graph
from stepping import own_logits
from torch import Tensor

from compress import formats
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError
from compress.formats.activations import Activation
from compress.formats.base import Quantized
from compress.model.roles import Role
from compress.model.routing import Router
from compress.model.weight import PLAIN_DTYPES, Weight
from compress.passes.quantization import rounding
from compress.passes.quantize import Options as QuantizeOptions
from compress.runtime.eager import Eager
from exporters.dialects.base import Tokens
from exporters.dialects.tensorrt import TensorRTHalf, TensorRTSingle, gathering
from exporters.graph import reading, stack
from exporters.graph.builder import Graph, WeightFile
from exporters.tensorrt import Options
from exporters.tensorrt import TensorRT as Exporter

SEEN = 24  # by the router
CLOSE = 2e-5  # float32 sums in another order, of numbers of about one


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Case:
    """`formats`, `rotated` and `scales` of static inputs: of experts in turn."""

    formats: tuple[str, ...] = ("fp32",)
    width: int = SEEN  # what experts see and give
    inner: int = 20
    experts: int = 5
    top_k: int = 2
    shape: tuple[int, int] = (1, 7)
    gated: bool = True
    activation: str | None = None
    scales: tuple[float, ...] = (0.02,)
    rotated: tuple[bool, ...] = (False,)

    @property
    def router(self) -> Router:
        return Router("router", self.experts, self.top_k)

    def weights(self) -> dict[str, Weight]:
        found = {"router": plain("router", normal(self.experts, SEEN, seed=1)), "enter": plain("enter", self._enter())}
        for expert in range(self.experts):
            for place, name in enumerate(("gate", "up", "down")):
                shape = (self.width, self.inner) if name == "down" else (self.inner, self.width)
                tensor = normal(*shape, seed=10 + 3 * expert + place) / shape[1] ** 0.5
                full = f"experts.{expert}.{name}.weight"
                found[full] = self._stored(expert, plain(full, tensor))
        return found

    def _enter(self) -> Tensor:
        return normal(self.width, SEEN, seed=2) / SEEN**0.5

    def _stored(self, expert: int, weight: Weight) -> Weight:
        wanted = self.formats[expert % len(self.formats)]
        if wanted in PLAIN_DTYPES:
            return rounding.as_plain(weight, wanted)
        known = formats.get(formats.fitting(wanted, weight.shape))
        rotation = rounding.rotation_of(weight) if self.rotated[expert % len(self.rotated)] else None
        stored = rounding.to_nearest(weight, known, clips=False, rotation=rotation)
        scale = self.scales[expert % len(self.scales)]
        return replace(stored, activation=self.activation and Activation(self.activation, lambda: scale))

    def build(self, ops, x):
        """Experts see another space than the router does, as those of a LatentMoE."""
        rows = x if self.width == SEEN else ops.linear("enter", x)
        return ops.mixture(x, rows, self.router, self.experts, lambda e, part: self._run(ops, e, part))

    def _run(self, ops, expert: int, x):
        up = ops.linear(f"experts.{expert}.up.weight", x)
        gate = ops.silu(ops.linear(f"experts.{expert}.gate.weight", x)) if self.gated else None
        return ops.linear(
            f"experts.{expert}.down.weight", ops.squared_relu(up) if gate is None else ops.multiply(gate, up)
        )


def plain(name: str, tensor: Tensor) -> Weight:
    rows_of = lambda rows: tensor if rows is None else tensor[rows]  # noqa: E731 - a weight's `load`
    return Weight(name, Role.EXPERTS, tuple(tensor.shape), "fp32", rows_of)


class Own:
    """Products as a weight itself describes them: dense, with the input that it rounds."""

    def __init__(self, weights: dict[str, Weight]):
        self._weights = weights

    def __call__(self, name: str) -> Tensor:
        return self._weights[name].dense()

    def linear(self, name: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(self._weights[name].rounded_input(x), self(name), bias)


def given_by(folder, case: Case, weights: dict[str, Weight], dialect=TensorRTSingle) -> tuple[np.ndarray, np.ndarray]:
    """What the graph gives, and what torch does."""
    x = normal(*case.shape, SEEN, seed=3)
    x[..., 0] = 1

    def in_graph(graph, given):
        ops = dialect(graph, Tokens(given, given)).of(weights)
        return graph.float32(case.build(ops, graph.from_float32(given)))

    actual = run_graph(folder, {"x": x.numpy()}, case.width, in_graph, graph=dialect.new_graph)
    return actual, case.build(Eager(Own(weights)), x).numpy()


ALIKE = {
    "plain": Case(),
    "bf16": Case(("bf16",), shape=(3, 11)),
    "one expert": Case(experts=1, top_k=1),
    "one token": Case(("int8",), shape=(1, 1)),
    "every expert": Case(("int8",), experts=3, top_k=3, shape=(3, 5)),
    "not gated, latent": Case(("int8",), width=12, inner=17, gated=False, top_k=3, shape=(3, 1)),
    "int8": Case(("int8",), inner=19, top_k=1),
    "int8-tensor": Case(("int8-tensor",)),
    "int8 in groups": Case(("int8-g32",), width=64, inner=96),
    "int4": Case(("int4-g32",), width=64, inner=32, shape=(3, 7)),
    "int4 where the group is no divisor": Case(("int4-g32",), width=48, inner=80),
    "int4 where no group is": Case(("int4-g32",), inner=20),
    "fp8": Case(("fp8-e4m3",), width=13),
    "fp8-tensor": Case(("fp8-e4m3-tensor",)),
    "rotated": Case(("int8",), width=32, inner=64, rotated=(True,)),
}
APART = {
    "inputs of one scale": Case(("int8",), activation="static-int8"),
    "inputs of several scales": Case(("int8",), activation="static-int8", scales=(0.01, 0.02, 0.02), shape=(3, 5)),
    "fp8 inputs of several scales": Case(("fp8-e4m3",), activation="static-fp8", scales=(0.01, 0.02, 0.005)),
    "several formats": Case(("int8", "int4-g16", "int8", "fp8-e4m3"), width=32, inner=48, top_k=3, shape=(3, 7)),
    "some rotated": Case(("int8",), width=32, inner=64, rotated=(False, True), experts=4, top_k=3),
    "each in another format": Case(("int8", "fp8-e4m3", "bf16", "int8-tensor", "int4-g16"), width=32, inner=48),
}


@pytest.mark.parametrize("case", (ALIKE | APART).values(), ids=[*ALIKE, *APART])
def test_every_expert_on_every_token_is_our_own_mixture(tmp_path, case):
    actual, expected = given_by(tmp_path, case, case.weights())
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(actual, expected, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("case", ALIKE.values(), ids=list(ALIKE))
def test_gathered_experts_are_our_own_mixture(tmp_path, case):
    actual, expected = given_by(tmp_path, case, case.weights(), gathering(TensorRTSingle))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=CLOSE)
    assert {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node} >= {"Gather", "TopK"}


@pytest.mark.parametrize(("case", "stacks"), [(ALIKE["int8"], 3), (APART["several formats"], 3 * 3)])
def test_experts_that_are_alike_are_one_matrix(tmp_path, case, stacks):
    """int8, int8 and int8 again are: 0, 2 and 4 of the case in several formats."""
    given_by(tmp_path, case, case.weights())
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    shapes = {init.name: list(init.dims) for init in graph.initializer if init.name.startswith("experts.")}
    assert len([name for name in shapes if not name.endswith("_scale")]) == stacks
    if stacks == 9:
        assert shapes["experts.[0,2,4].up.weight"] == [3, case.width, case.inner]
        assert shapes["experts.[0,2,4].up.weight_scale"] == [3, 1, case.inner]
        assert shapes["experts.1.up.weight_scale"] == [1, case.width // 16, case.inner]


@pytest.mark.parametrize("dialect", [TensorRTSingle, TensorRTHalf])
@pytest.mark.parametrize("formats", [("fp32",), ("fp32", "bf16")], ids=["together", "apart"])
def test_what_an_expert_that_was_not_chosen_cannot_hold_stays_out_of_the_sum(tmp_path, dialect, formats):
    """Its output is infinite, whatever type a runtime computes in; no token goes there."""
    case = Case(formats, gated=False, experts=4, shape=(2, 5))
    weights, huge = case.weights(), torch.full((case.inner, case.width), 1e30)
    weights["experts.2.up.weight"] = replace(
        plain("experts.2.up.weight", huge), format=formats[0], load=lambda rows: huge
    )
    router = weights["router"].dense().clone()
    router[:, 0], router[2, 0] = 0, -100
    weights["router"] = plain("router", router)
    actual, expected = given_by(tmp_path, case, weights, dialect)
    assert np.isfinite(actual).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=CLOSE if dialect is TensorRTSingle else 5e-3)


# writing


@pytest.mark.parametrize("number_format", ["bf16", "int8", "int4-g32", "fp8-e4m3"])
def test_an_expert_is_written_before_the_next_is_read(tmp_path, number_format):
    shape, sizes, path = (256, 512), list[int](), tmp_path / "data"

    def watched(expert: int) -> Weight:
        weight = plain(f"experts.{expert}.up.weight", normal(*shape, seed=expert))
        stored = (
            rounding.as_plain(weight, number_format)
            if number_format in PLAIN_DTYPES
            else rounding.to_nearest(weight, formats.get(number_format), clips=False)
        )

        def load(rows: slice | None = None):
            sizes.append(path.stat().st_size)
            return stored.load(rows)

        return replace(stored, load=load)

    file = WeightFile(path)
    graph = Graph(file, 22, body_type=ir.DataType.BFLOAT16)
    stack.matrices(graph, stack.Stack(tuple(map(watched, range(4)))))
    file.close()
    bits = {"bf16": 16, "int4-g32": 4}.get(number_format, 8)
    assert sizes == [expert * 256 * 512 * bits // 8 for expert in range(4)]


# a whole model


def exported(folder, checkpoint: Checkpoint, **options):
    folder.mkdir()
    exporter = Exporter(Options(build="never", **options))
    exporter.refuse(checkpoint.model)
    exporter.export(checkpoint, folder, lambda parameters: None)
    return folder / "model.onnx"


@pytest.fixture(scope="module")
def int8(applied) -> Checkpoint:
    return Checkpoint(applied / "checkpoint", allow_quantized=True)


BODY = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("precision", list(BODY))
def test_every_tensor_is_read_back(tmp_path, int8, precision):
    """Values bit for bit, scales in the type of hidden states; experts by their own names."""
    path = exported(tmp_path / "out", int8, precision=precision)
    graph = reading.load(path)
    written, found = {w.name: w for w in int8.model.weights}, {w.name: w for w in reading.hybrid(graph, path).weights}
    assert found.keys() == written.keys()
    for name, weight in written.items():
        before, after = weight.load(None), found[name].load(None)
        assert found[name].format == weight.format
        if isinstance(before, Quantized):
            assert torch.equal(after.values, before.values)
            assert torch.equal(after.scales, before.scales.to(BODY[precision]).float())
        else:
            assert torch.equal(after, before) and after.dtype == before.dtype
    tensors = reading.external_tensors(graph)
    assert reading.stored_formats(tensors) == {w.name: w.format for w in int8.model.weights}
    assert sum(reading.stored_parameters(tensors).values()) == int8.model.parameters
    assert sum(tensor.nbytes for tensor in tensors) <= (path.parent / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("options", [{}, {"experts": "gather"}], ids=["dense", "gather"])
def test_a_graph_with_stacks_computes_its_checkpoint(tmp_path, int8, options):
    path = exported(tmp_path / "out", int8, precision="fp32", **options)
    ids = np.random.default_rng(0).integers(3, 2048, (2, 13))
    session = make_session(path, EXACT)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs()[2:]:
        feeds[value.name] = np.zeros((2, *(s if isinstance(s, int) else 0 for s in value.shape[1:])), np.float32)
    actual = session.run(["logits"], feeds)[0]
    expected = own_logits(int8.model, torch.from_numpy(ids), [13]).numpy()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-3)
    stacks = [i for g in all_graphs(onnx.load(path).graph) for i in g.initializer if ".experts.[0-7]." in i.name]
    assert {len(i.dims) for i in stacks} == {3} and len(stacks) == 2 * 3 * sum(
        layer.num_experts > 1 for layer in int8.model.layers
    )


@pytest.mark.parametrize("damage", ["experts.[0-6].", "experts.[0-"], ids=["too few names", "no names"])
def test_a_stack_whose_names_are_damaged_is_refused(tmp_path, int8, damage):
    path = exported(tmp_path / "out", int8, precision="bf16")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.metadata_props:
            if entry.key == "members":
                entry.value = entry.value.replace("experts.[0-7].", damage)
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"experts\.\[0-"):
        reading.external_tensors(reading.load(path))


# what cannot be gathered


def test_experts_that_round_their_inputs_are_not_gathered(tiny):
    model = Checkpoint(tiny).model
    options = QuantizeOptions(weights="int8", activations="static-int8")
    units = tuple(unit.map(lambda weight: rounding.lazily(weight, options, "cpu")) for unit in model.units)
    with pytest.raises(InputError, match=r"experts: gather .*experts\.0\.gate_proj.*static-int8.*use dense"):
        Exporter(Options(experts="gather")).refuse(replace(model, units=units))
    Exporter(Options(experts="dense")).refuse(replace(model, units=units))


def test_experts_in_several_formats_are_not_gathered(tiny):
    model = Checkpoint(tiny).model
    to_int8 = lambda weight: rounding.to_nearest(weight, formats.get("int8"), clips=False)  # noqa: E731
    units = tuple(unit.map(lambda w: to_int8(w) if ".experts.3.up" in w.name else w) for unit in model.units)
    with pytest.raises(InputError, match=r"experts\.0\.up_proj\.weight' is bf16 .*experts\.3\.up_proj\.weight' int8"):
        Exporter(Options(experts="gather")).refuse(replace(model, units=units))
