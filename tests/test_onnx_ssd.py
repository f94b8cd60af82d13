"""Mamba-2's recurrence as it is exported, against a loop over tokens in float64."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_graphs import all_graphs, assert_shapes_are_inferred

from exporters.graph.builder import Graph, WeightFile, declare, rename
from exporters.graph.ssd import ssd

BOUND = 1e-5  # of the largest value


class Sizes(NamedTuple):
    heads: int
    head_dim: int
    groups: int
    d_state: int


AWKWARD = [Sizes(6, 5, 1, 7), Sizes(6, 3, 2, 9), Sizes(6, 5, 3, 1), Sizes(6, 1, 6, 5), Sizes(1, 3, 1, 3)]


class Case(NamedTuple):
    path: Path
    sizes: Sizes
    a_log: np.ndarray
    d: np.ndarray

    def run(self, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return ort.InferenceSession(self.path, providers=["CPUExecutionProvider"]).run(None, inputs)


def build(folder: Path, sizes: Sizes, layers: int = 1, stored=torch.float32) -> Case:
    """`layers` of them on the same inputs and weights, y of one being x of the next; the last one's state is returned."""
    weights = WeightFile(folder / "model.onnx.data")
    graph, random = Graph(weights, 21), np.random.default_rng(1)
    batch, wide = ["batch_size", "sequence_length"], sizes.groups * sizes.d_state
    shapes = {"x": [*batch, sizes.heads * sizes.head_dim], "dt": [*batch, sizes.heads], "b": [*batch, wide]}
    shapes |= {"c": [*batch, wide], "state": ["batch_size", sizes.heads, sizes.d_state, sizes.head_dim]}
    inputs = {name: declare(name, ir.DataType.FLOAT, shape) for name, shape in shapes.items()}
    a_log = torch.tensor(np.log(random.uniform(1, 16, sizes.heads))).to(stored)
    d = torch.tensor(random.normal(size=sizes.heads), dtype=torch.float32)
    kept_a, kept_d = graph.stored("a_log", a_log), graph.stored("d", d)

    def a(body: Graph) -> ir.Value:
        return body.op("Neg", body.op("Exp", body.op("Cast", kept_a, to=ir.DataType.FLOAT)))

    y, dt, b, c, first = inputs.values()
    for _ in range(layers):
        y, state = ssd(graph, y, dt, a, b, c, kept_d, first, **sizes._asdict())
    outputs = [rename(y, "y", ir.DataType.FLOAT, shapes["x"]), rename(state, "new", ir.DataType.FLOAT, shapes["state"])]
    weights.close()
    ir.save(ir.Model(graph.finish(list(inputs.values()), outputs, "ssd"), ir_version=10), folder / "model.onnx")
    return Case(folder / "model.onnx", sizes, a_log.double().numpy(), d.double().numpy())


@pytest.fixture(params=AWKWARD, ids=lambda sizes: "-".join(map(str, sizes)))
def case(request, tmp_path) -> Case:
    return build(tmp_path, request.param)


def draw(sizes: Sizes, batch: int, length: int) -> dict[str, np.ndarray]:
    random, wide = np.random.default_rng(length), sizes.groups * sizes.d_state
    widths = {"x": sizes.heads * sizes.head_dim, "dt": sizes.heads, "b": wide, "c": wide}
    found = {name: random.normal(size=(batch, length, width)) for name, width in widths.items()}
    found["dt"] = np.log1p(np.exp(2 * found["dt"] - 2))
    found["state"] = random.normal(size=(batch, sizes.heads, sizes.d_state, sizes.head_dim))
    return {name: value.astype(np.float32) for name, value in found.items()}


def expected(case: Case, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token by token, head by head."""
    heads, head_dim, groups, d_state = case.sizes
    x, dt, b, c, state = (value.astype(np.float64) for value in inputs.values())
    y = np.zeros_like(x)
    for row in range(len(x)):
        for head in range(heads):
            channels = slice(head * head_dim, (head + 1) * head_dim)
            group = head // (heads // groups)
            states = slice(group * d_state, (group + 1) * d_state)
            h = state[row, head]
            for t in range(x.shape[1]):
                step, fed = dt[row, t, head], x[row, t, channels]
                h = np.exp(-np.exp(case.a_log[head]) * step) * h + step * np.outer(b[row, t, states], fed)
                y[row, t, channels] = c[row, t, states] @ h + case.d[head] * fed
            state[row, head] = h
    return y, state


def assert_agrees(found, reference, bound: float = BOUND) -> None:
    for value, exact in zip(found, reference, strict=True):
        assert value.shape == exact.shape
        assert np.abs(value - exact).max() <= bound * np.abs(exact).max()


def steps_of(inputs: dict[str, np.ndarray], tokens: slice) -> dict[str, np.ndarray]:
    return {name: value if name == "state" else value[:, tokens] for name, value in inputs.items()}


@pytest.mark.parametrize("length", [1, 7, 64, 65, 129])
def test_it_is_the_recurrence(case, length):
    inputs = draw(case.sizes, 1, length)
    assert_agrees(case.run(inputs), expected(case, inputs))


@pytest.mark.parametrize("sizes", [Sizes(6, 64, 2, 32), Sizes(4, 16, 2, 128)], ids=str)
def test_it_is_the_recurrence_for_a_long_prompt(tmp_path, sizes):
    case, inputs = build(tmp_path, sizes), draw(sizes, 1, 512)
    assert_agrees(case.run(inputs), expected(case, inputs))


def test_rows_padded_on_the_left_are_as_alone(case):
    inputs, lengths = draw(case.sizes, 3, 70), (70, 66, 3)
    for row, length in enumerate(lengths):
        inputs["dt"][row, : 70 - length] = 0
    y, state = case.run(inputs)
    for row, length in enumerate(lengths):
        alone = {name: value[row : row + 1] for name, value in steps_of(inputs, slice(70 - length, None)).items()}
        assert_agrees((y[row : row + 1, 70 - length :], state[row : row + 1]), expected(case, alone))


@pytest.mark.parametrize("length", [1, 65])
def test_padding_alone_leaves_the_state_as_it_was(case, length):
    inputs = draw(case.sizes, 2, length)
    inputs["dt"][:] = 0
    np.testing.assert_array_equal(case.run(inputs)[1], inputs["state"])


def test_a_state_carried_on_gives_what_one_call_gives(case):
    inputs, pieces, seen = draw(case.sizes, 2, 140), [], 0
    carried = inputs["state"]
    for count in (65, 1, 1, 66, 1, 6):
        y, carried = case.run(steps_of(inputs, slice(seen, seen + count)) | {"state": carried})
        pieces.append(y)
        seen += count
    assert_agrees((np.concatenate(pieces, 1), carried), expected(case, inputs))


def test_a_decay_that_forgets_everything_spoils_nothing_after_it(case):
    """exp(-800) is 0 in float32, its inverse infinite; and a sum of 10,000 leaves no digits for differences of 0.01."""
    inputs = draw(case.sizes, 1, 64)
    inputs["dt"][:, :20] = 50
    inputs["dt"][:, 20:] /= 1000
    assert_agrees(case.run(inputs), expected(case, inputs), 1e-6)


def test_a_decay_stored_in_bfloat16_is_widened(tmp_path):
    case = build(tmp_path, AWKWARD[1], stored=torch.bfloat16)
    inputs = draw(case.sizes, 2, 66)
    assert_agrees(case.run(inputs), expected(case, inputs))


# the graph


@pytest.mark.parametrize(
    ("length", "chunks"), [(1, (1, 1)), (64, (1, 64)), (65, (2, 33)), (129, (3, 43)), (193, (4, 49))]
)
def test_hardly_any_padding_is_computed(tmp_path, length, chunks):
    case = build(tmp_path, AWKWARD[0])
    model = onnx.load(case.path)
    scan = next(node for node in model.graph.node if node.op_type == "Scan")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(scan.input[1]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    cut = session.run([scan.input[1]], draw(case.sizes, 1, length))[0]
    assert cut.shape[1:3] == chunks


def test_layers_share_what_follows_from_the_length(tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    counts = []
    for folder, layers in ((one, 1), (three, 3)):
        folder.mkdir()
        nodes = onnx.load(build(folder, AWKWARD[1], layers).path).graph.node
        counts.append(Counter(node.op_type for node in nodes))
    for kind in ("Shape", "Div", "Sub", "ConstantOfShape", "Trilu"):
        assert counts[0][kind] == counts[1][kind] > 0
    assert counts[1]["Scan"] == 3


def test_it_is_standard_and_its_body_takes_only_stored_weights_from_outside(case):
    onnx.checker.check_model(case.path, full_check=True)
    graph, body = all_graphs(onnx.load(case.path).graph)
    assert {node.domain for part in (graph, body) for node in part.node} == {""}
    own = {value.name for value in (*body.input, *body.initializer, *graph.initializer)}
    own |= {output for node in body.node for output in node.output}
    assert {name for node in body.node for name in node.input} <= own


def test_symbolic_shape_inference_knows_every_shape(case, monkeypatch):
    assert_shapes_are_inferred(case.path, monkeypatch)
