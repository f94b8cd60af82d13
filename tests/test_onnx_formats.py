"""Every number format and every rounding of activations in the `onnx` exporter, against our own forward.

First single products and lookups, where the input is given and so every bit of it is known; then whole models through
`apply`; then how it is stored and what onnxruntime makes of it.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_graphs
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from jamba_models import make_jamba
from onnx_graphs import EXACT, all_graphs, assert_shapes_are_inferred, make_session
from safetensors import safe_open

from compress import formats
from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.formats import hadamard
from compress.formats.activations import NAMES as ACTIVATIONS
from compress.formats.activations import Activation
from compress.model import weight as compress_model
from compress.model.roles import Role
from compress.model.weight import PLAIN_DTYPES, Weight
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.inference import Head, stream
from compress.runtime.onnx_session import OnnxSession
from compress.studies.inspection import inspect
from exporters import onnx as exporter
from exporters.graph.builder import Graph
from exporters.graph.linear import linear
from exporters.graph.table import Table

EXPORTER = exporter.Onnx(exporter.Options())

QUANTIZED = tuple(formats.FILES)
FORMATS = (*QUANTIZED, *formats.PLAIN)
WHOLE = ("int8", "int8-tensor")
AGREEMENT = 1e-3  # largest difference between logits: the project's requirement on an exported graph
# Of a product of K float32 terms, relative to the sum of their magnitudes: K x 2^-24 at worst, for the largest K here.
SUMS = 256 * 2.0**-24


# a single weight


def random_matrix(shape: tuple[int, int], wide: bool) -> torch.Tensor:
    """Normal values and a row of zeros; `wide`: rows of magnitudes so far apart that their scales do not fit a byte."""
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=g) * (
        10 ** torch.empty(shape[0], 1).uniform_(-3, 3, generator=g) if wide else 1
    )
    matrix[1] = 0
    return matrix


def make_weight(number_format: str, shape: tuple[int, int], activation=None, rotation=None, wide=False) -> Weight:
    """A weight that loads by blocks of rows, as those of checkpoints do."""
    matrix = random_matrix(shape, wide)
    if number_format in PLAIN_DTYPES:
        stored = matrix.to(PLAIN_DTYPES[number_format])
        return Weight("w", Role.MLP, shape, number_format, lambda rows=None: stored if rows is None else stored[rows])
    kind = formats.get(number_format)
    whole, step = kind.quantize(matrix), kind.rows

    def load(rows: slice | None = None):
        if rows is None:
            return whole
        scales = whole.scales if step is None else whole.scales[rows.start // step : -(-rows.stop // step)]
        return type(whole)(whole.values[rows], scales, number_format)

    return Weight("w", Role.MLP, shape, number_format, load, activation, rotation)


def run_graph(folder: Path, x: np.ndarray, width: int, build, options: dict | None = None) -> np.ndarray:
    return onnx_graphs.run_graph(folder, {"x": x}, width, build, options or EXACT)


def make_inputs(width: int) -> np.ndarray:
    """[2, 4, width]: ties of int8 and of fp8 at scale 1 (a token's largest is 127 or 448), saturation, a token of zeros."""
    x = np.random.default_rng(5).standard_normal((2, 4, width)).astype(np.float32) * 3
    x[0, 0] = np.resize([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 99.5], width)
    x[0, 1] = np.resize([448, 17, 19, -17, -21, 0.0009765625, 33, 35], width)
    x[0, 2] = 0
    x[1, 0, :4] = [1e6, -1e6, 500, -500]
    return x


def make_activation(name: str | None) -> Activation | None:
    return name and Activation(name, (lambda: 1.0) if name.startswith("static") else None)


def assert_product(actual: np.ndarray, x: torch.Tensor, weight: Weight):
    """Against the rounded input times the widened matrix, in float64; nothing but the order of float32 sums differs."""
    rounded, dense = weight.rounded_input(x).double(), weight.dense()
    expected, scale = F.linear(rounded, dense.double()), F.linear(rounded.abs(), dense.abs().double())
    assert actual.shape == expected.shape
    assert (np.abs(actual - expected.numpy()) <= SUMS * scale.numpy()).all()


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("number_format", FORMATS)
def test_a_product_with_a_stored_matrix(tmp_path, monkeypatch, number_format, wide):
    """K is no multiple of the block of 128, nor N; the matrix is read in several blocks of rows."""
    shape = (150, 192 if number_format != "int4-g128" else 256)
    monkeypatch.setattr(compress_model, "BLOCK_BYTES", 4 * 130 * shape[1])
    weight, x = make_weight(number_format, shape, wide=wide), make_inputs(shape[1])
    assert len(list(weight.row_blocks())) > 1
    actual = run_graph(tmp_path, x, shape[0], lambda graph, value: linear(graph, value, weight))
    assert_product(actual, torch.from_numpy(x), weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("number_format", QUANTIZED)
def test_a_product_with_a_rounded_input(tmp_path, number_format, activation):
    """The input is the same on both sides to the last bit, so every rounding must be too, ties included."""
    shape = (150, 192 if number_format != "int4-g128" else 256)
    weight, x = make_weight(number_format, shape, make_activation(activation)), make_inputs(shape[1])
    rounded = weight.activation.fake_quantize(torch.from_numpy(x))
    assert (rounded - torch.from_numpy(x)).abs().max() > 0.2  # rounding is to be seen
    actual = run_graph(tmp_path, x, shape[0], lambda graph, value: linear(graph, value, weight))
    assert_product(actual, torch.from_numpy(x), weight)


@pytest.mark.parametrize("width", [8, 24, 96, 512])
@pytest.mark.parametrize(("number_format", "activation"), [("int8", "static-int8"), ("int8-tensor", None)])
def test_a_product_with_a_rotated_input(tmp_path, number_format, activation, width):
    """Inputs of one value or two of a magnitude: no sum in their rotation rounds, and so it is rounded to int8 alike. The
    bound is relative to the lengths of the vectors, which a rotation keeps."""
    weight = make_weight(number_format, (24, width), make_activation(activation), hadamard.block_size(width))
    x = torch.zeros(2, 3, width)
    x[..., 1], x[0, ..., 6], x[1, :2, 3] = 40, 40, -40
    actual = run_graph(tmp_path, x.numpy(), 24, lambda graph, value: linear(graph, value, weight))
    expected, dense = F.linear(weight.rounded_input(x), weight.dense()), weight.dense()
    bound = 1e-5 * x.norm(dim=-1, keepdim=True) * (dense.norm(dim=-1) + 1)
    assert (np.abs(actual - expected.numpy()) <= bound.numpy()).all()
    unrotated = F.linear(x, replace(weight, rotation=None).dense())
    assert ((unrotated - expected).abs() > 100 * bound).any()
    none = run_graph(tmp_path, x.numpy()[0, :0], 24, lambda graph, value: linear(graph, value, weight))
    assert none.shape == (0, 24)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("number_format", FORMATS)
def test_a_product_with_no_rows(tmp_path, number_format, activation):
    """An expert that no token chose."""
    weight = make_weight(number_format, (24, 128), make_activation(activation if number_format in QUANTIZED else None))
    x = np.zeros((0, 128), np.float32)
    assert run_graph(tmp_path, x, 24, lambda graph, value: linear(graph, value, weight)).shape == (0, 24)


@pytest.mark.parametrize("activation", ["static-int8", "dynamic-int8"])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_whole_numbers_do_not_saturate(tmp_path, activation, sign):
    """On processors without VNNI onnxruntime's uint8 x int8 kernels hold sums of two products in 16 bits: 2 x 127 x 255 is
    too much for them. That is what QuantizeLinear, DequantizeLinear and MatMul become."""
    stored = formats.get("int8").quantize(torch.full((8, 64), float(sign)))
    weight = Weight("w", Role.MLP, (8, 64), "int8", lambda rows=None: stored, make_activation(activation))
    x = torch.full((2, 64), 127.0)
    actual = run_graph(tmp_path, x.numpy(), 8, lambda graph, value: linear(graph, value, weight), {})
    assert_product(actual, x, weight)


# the embedding


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("number_format", FORMATS)
def test_rows_of_the_embedding_are_the_stored_ones_to_the_last_bit(tmp_path, number_format, wide):
    weight = make_weight(number_format, (200, 256), wide=wide)
    ids = np.array([[0, 1, 199], [128, 7, 127]])
    rows = run_graph(tmp_path, ids, 1, lambda graph, value: flattened(graph, Table(graph, weight).lookup(value)))
    assert np.array_equal(rows.reshape(2, 3, 256), weight.dense().numpy()[ids])


def flattened(graph: Graph, rows: ir.Value) -> ir.Value:
    return graph.op("Reshape", rows, graph.constant([-1, 1]))


@pytest.mark.parametrize("activation", [None, "dynamic-int8", "static-fp8"])
@pytest.mark.parametrize("number_format", FORMATS)
def test_a_tied_head_multiplies_with_the_table_that_is_looked_up(tmp_path, number_format, activation):
    activation = make_activation(activation if number_format in QUANTIZED else None)
    weight, x = make_weight(number_format, (200, 256), activation), make_inputs(256)

    def build(graph: Graph, value: ir.Value) -> ir.Value:
        table = Table(graph, weight)
        table.lookup(graph.constant([[0, 1]]))
        return table.project(value)

    actual = run_graph(tmp_path, x, 200, build)
    assert_product(actual, torch.from_numpy(x), weight)
    assert [name for name in initializers(tmp_path / "model.onnx") if name.startswith("w")] in (["w"], ["w", "w_scale"])


def test_a_rotated_table_is_looked_up_in_the_models_own_basis(tmp_path):
    weight, ids = make_weight("int8-g32", (200, 96), rotation=32), np.array([[0, 1, 199]])
    rows = run_graph(tmp_path, ids, 1, lambda graph, value: flattened(graph, Table(graph, weight).lookup(value)))
    np.testing.assert_allclose(rows.reshape(3, 96), weight.dense().numpy()[ids[0]], atol=1e-5)
    x = make_inputs(96)
    actual = run_graph(tmp_path, x, 200, lambda graph, value: Table(graph, weight).project(value))
    np.testing.assert_allclose(actual, F.linear(torch.from_numpy(x), weight.dense()), rtol=1e-4, atol=1e-3)


# whole models

# hidden size and intermediate size that groups of 32 divide, and such that hardly any divides
SHAPES = {
    "fitting tied": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "tie_word_embeddings": True},
    "awkward": {},
}
SPREAD = 0.7  # see test_jamba_forward.py: keeps the noise of float32 itself far below the bound


class Applied:
    """The output of `apply` on a random model of four layers (one attention, one with experts, dt_rank 10)."""

    def __init__(self, folder: Path, changes: dict, quantize: dict):
        source = make_jamba(folder / "source", spread=SPREAD, **{"num_hidden_layers": 4, **changes})
        recipe = {
            "version": 1,
            "calibration": {"prompts": ["self"], "samples": 4, "length": 32},
            "passes": [{"quantize": quantize}],
            "export": [{"onnx": {}}],
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
        out = folder / "out"
        pipeline.apply(pipeline.Job(load_recipe(str(folder / "recipe.yaml")), resolve(str(source)), out))
        self.checkpoint, self.folder, self.path = out / "checkpoint", out / "onnx", out / "onnx" / "model.onnx"
        self.model, self._scratch = Checkpoint(self.checkpoint, allow_quantized=True).model, folder
        self._session = OnnxSession(self.path, EXACT, threads=1)

    @property
    def weights(self) -> dict[str, Weight]:
        return {weight.name: weight for weight in self.model.weights}

    def ids(self, batch: int, length: int) -> np.ndarray:
        return np.random.default_rng(7).integers(3, self.model.config.vocab_size, (batch, length))

    def own_logits(self, ids: np.ndarray, model=None) -> np.ndarray:
        model = model or self.model
        head, windows = Head(model, "cpu"), list(torch.from_numpy(ids))
        return np.concatenate([head(hidden).numpy() for _, hidden in stream(model, windows, self._scratch)])

    def onnx_logits(self, ids: np.ndarray, prefill: int) -> np.ndarray:
        """A prefill, then token by token."""
        generation = self._session.start(len(ids))
        pieces = np.split(ids, range(prefill, ids.shape[1]), axis=1)
        return np.concatenate([generation.step(piece).copy() for piece in pieces], 1)


@pytest.fixture(scope="module", params=[(f, s) for f in FORMATS for s in SHAPES], ids=" ".join)
def stored_as(request, tmp_path_factory) -> Applied:
    number_format, shape = request.param
    return Applied(tmp_path_factory.mktemp("formats"), SHAPES[shape], {"weights": number_format})


def test_logits_are_those_of_our_own_forward(stored_as):
    ids = stored_as.ids(3, 30)
    expected = stored_as.own_logits(ids)
    for batch in (3, 1):
        actual = stored_as.onnx_logits(ids[:batch], prefill=24)
        assert actual.shape == expected[:batch].shape
        assert np.abs(actual - expected[:batch]).max() <= AGREEMENT


ROUNDED = [
    *((name, activation) for name in WHOLE for activation in ("static-int8", "dynamic-int8")),
    ("int8-g32", "static-int8"),
    ("int4-g32", "dynamic-int8"),
    ("fp8-e4m3-tensor", "static-fp8"),
    ("fp8-e4m3", "dynamic-fp8"),
    ("int8", "static-fp8"),
]
NAMED_ROLES = ("ssm_x_proj", "ssm_dt_proj", "ssm_out")  # rounded only where a recipe names them


@pytest.fixture(scope="module", params=[(*r, s) for r in ROUNDED for s in SHAPES], ids=" ".join)
def rounded_to(request, tmp_path_factory) -> Applied:
    number_format, activation, shape = request.param
    named = (*NAMED_ROLES, *(("embedding",) if activation.startswith("dynamic") else ()))
    roles = dict.fromkeys(named, activation) if shape == "fitting tied" else {}
    quantize = {"weights": number_format, "activations": activation, "activation_roles": roles}
    return Applied(tmp_path_factory.mktemp("activations"), SHAPES[shape], quantize)


def without_activations(model):
    return replace(model, units=tuple(unit.map(lambda w: replace(w, activation=None)) for unit in model.units))


def assert_rounds_alike(applied: Applied):
    """Where an input lies at a tie, the noise of float32 (1e-6 or so) decides which way it goes, here and there differently.
    That moves one of some thousand values of a token by a step, a per cent of the largest, and through the states all
    tokens that follow: by itself no error. So the sequences are many and short, most tokens must agree as closely as
    without rounding, and the mean difference must be small against what rounding does at all.
    """
    ids = applied.ids(24, 5)
    expected = applied.own_logits(ids)
    moved = np.abs(applied.own_logits(ids, without_activations(applied.model)) - expected).max(-1)
    assert np.median(moved) > 10 * AGREEMENT
    one_by_one = np.concatenate([applied.onnx_logits(row[None], prefill=1) for row in ids])
    for actual in (applied.onnx_logits(ids, prefill=3), one_by_one):
        apart = np.abs(actual - expected).max(-1)
        assert np.median(apart) <= AGREEMENT
        assert apart.mean() <= 0.25 * moved.mean()


def test_logits_with_rounded_activations_are_those_of_our_own_forward(rounded_to):
    assert_rounds_alike(rounded_to)


@pytest.mark.parametrize("activation", ["static-int8", "dynamic-fp8"])
def test_logits_with_rotated_inputs_are_those_of_our_own_forward(tmp_path, activation):
    """Blocks of 16 and 8: those of widths 80 and 40. Experts share a rotated input between gate and up."""
    roles = ["ssm_out", "experts"]
    quantize = {"weights": "int8", "activation_roles": dict.fromkeys(roles, activation), "rotate": roles}
    applied = Applied(tmp_path, SHAPES["awkward"], quantize)
    assert {weight.rotation for weight in applied.weights.values()} == {None, 16, 8}
    assert_rounds_alike(applied)


# how it is stored


def nodes_of(path: Path) -> list[onnx.NodeProto]:
    return [node for graph in all_graphs(onnx.load(path, load_external_data=False).graph) for node in graph.node]


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    """Those in the data file."""
    graphs = all_graphs(onnx.load(path, load_external_data=False).graph)
    tensors = (tensor for graph in graphs for tensor in graph.initializer)
    return {t.name: t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL}


def place(tensor: onnx.TensorProto) -> SimpleNamespace:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return SimpleNamespace(offset=int(entries["offset"]), length=int(entries["length"]))


def read(path: Path, tensor: onnx.TensorProto) -> np.ndarray:
    """A stored tensor of a type of whole bytes, 16 bits widened to float32."""
    where, dtype = place(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = np.fromfile(path.parent / "model.onnx.data", dtype, where.length // dtype.itemsize, offset=where.offset)
    return values.reshape(tensor.dims)


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    return tensors


def step_of(path: Path, name: str) -> float:
    """The number that steps in a byte are multiplied with, in the graph: after a Cast, and perhaps a Transpose or Gather."""
    model = onnx.load(path, load_external_data=False)
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.HasField("raw_data")}
    reached, factors = {name}, []
    for node in model.graph.node:
        if reached & set(node.input):
            if node.op_type in ("Cast", "Transpose", "Gather"):
                reached |= set(node.output)
            elif node.op_type == "Mul":
                factors += [constants[other] for other in node.input if other not in reached]
    assert len(set(map(float, factors))) == 1
    return float(factors[0])


def exported_scales(path: Path, tensor: onnx.TensorProto) -> np.ndarray:
    stored = read(path, tensor)
    if stored.dtype != np.uint8:
        return stored.astype(np.float32)
    step = step_of(path, tensor.name)
    assert np.log2(step) == round(np.log2(step))
    return stored.astype(np.float32) * np.float32(step)


EMBEDDING = "model.embed_tokens.weight"


def test_scales_are_those_of_the_checkpoint_to_the_last_bit(stored_as):
    source, tensors = checkpoint_tensors(stored_as.checkpoint), initializers(stored_as.path)
    names = [name for name in source if name.endswith("_scale")]
    assert bool(names) == any(weight.is_quantized for weight in stored_as.weights.values())
    for name in names:
        expected, actual = source[name].float().numpy(), exported_scales(stored_as.path, tensors[name])
        columns = formats.get(stored_as.weights[name.removesuffix("_scale")].format).columns
        if columns is not None and not name.startswith(EMBEDDING):
            expected = expected.T
        assert np.array_equal(actual, expected.reshape(actual.shape)), name
        if columns is not None:
            assert actual.shape == expected.shape
        if source[name].dtype == torch.bfloat16:
            assert tensors[name].data_type == onnx.TensorProto.UINT8  # one byte, where two are in the checkpoint


@pytest.mark.parametrize("number_format", ["int8-g32", "int4-g16"])
def test_scales_too_wide_for_a_byte_are_stored_in_two(tmp_path, number_format):
    weight = make_weight(number_format, (150, 64), wide=True)
    run_graph(tmp_path, make_inputs(64), 150, lambda graph, value: linear(graph, value, weight))
    scale = initializers(tmp_path / "model.onnx")["w_scale"]
    assert scale.data_type == onnx.TensorProto.BFLOAT16
    assert np.array_equal(exported_scales(tmp_path / "model.onnx", scale), weight.load().scales.T.numpy())


def scaled_as_asked(number_format: str, scales: torch.Tensor) -> Weight:
    """A matrix [8, two groups] whose scales are the given ones, [8, 2], as a checkpoint may bring them."""
    kind, shape = formats.get(number_format), (8, 2 * formats.get(number_format).columns)
    stored = kind.quantize(random_matrix(shape, wide=False) * kind.expand(scales, shape) * 40, scales)
    return Weight("w", Role.MLP, shape, number_format, lambda rows=None: stored)


@pytest.mark.parametrize("most", [255.0, 256.0, 128.0])
@pytest.mark.parametrize("number_format", ["int8-g32", "int4-g16"])
def test_scales_at_the_end_of_a_bytes_range_are_the_stored_ones(tmp_path, number_format, most):
    """256 steps beside 129 of them do not fit a byte, nor half as many of twice the size: they take two bytes."""
    scales = torch.tensor([[most, 129.0]] + [[100.0, 7.0]] * 7) * 2.0**-12
    weight, ids = scaled_as_asked(number_format, scales), np.arange(8).reshape(2, 4)
    x = make_inputs(weight.shape[1])
    product = run_graph(tmp_path, x, 8, lambda graph, value: linear(graph, value, weight))
    assert_product(product, torch.from_numpy(x), weight)
    scale = initializers(tmp_path / "model.onnx")["w_scale"]
    assert np.array_equal(exported_scales(tmp_path / "model.onnx", scale), scales.T.numpy())
    assert (scale.data_type == onnx.TensorProto.BFLOAT16) == (most == 256)
    rows = run_graph(tmp_path, ids, 1, lambda graph, value: flattened(graph, Table(graph, weight).lookup(value)))
    assert np.array_equal(rows.reshape(8, -1), weight.dense().numpy())


def expected_bits(weight: Weight) -> int:
    """Of one value; the README's table of formats in a line."""
    return {"int4": 4, "int8": 8, "fp8": 8, "bf16": 16, "fp16": 16, "fp32": 32}[weight.format.partition("-")[0]]


def test_every_weight_is_stored_under_its_name_in_the_bits_of_its_format(stored_as):
    tensors = initializers(stored_as.path)
    for name, weight in stored_as.weights.items():
        assert place(tensors[name]).length * 8 == weight.parameters * expected_bits(weight), name
    others = tensors.keys() - stored_as.weights.keys()
    assert others == {f"{w.name}_scale" for w in stored_as.weights.values() if w.is_quantized}


def test_the_predicted_size_is_the_size_of_the_weights(stored_as):
    """Alignment aside, which is under 64 bytes a tensor; no scale of these models needs more than a byte."""
    tensors = initializers(stored_as.path)
    predicted = EXPORTER.predict_bytes(stored_as.model.units)
    assert predicted == sum(place(tensor).length for tensor in tensors.values())
    assert 0 <= (stored_as.folder / "model.onnx.data").stat().st_size - predicted < 64 * len(tensors)


def test_the_graph_itself_holds_no_weights(stored_as):
    model = onnx.load(stored_as.path, load_external_data=False)
    inline = [t for g in all_graphs(model.graph) for t in g.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    sizes = sorted(int(np.prod(tensor.dims, initial=1)) for tensor in inline)
    if stored_as.weights[EMBEDDING].format.startswith("fp8"):
        assert sizes.pop() == 256  # what each byte means
    assert sizes[-1] <= 8


def test_an_artifact_names_the_formats_of_its_checkpoint(stored_as):
    described = EXPORTER.describe(stored_as.folder)
    assert described.formats == {name: weight.format for name, weight in stored_as.weights.items()}
    assert described.weight_bytes == sum(place(t).length for t in initializers(stored_as.path).values())
    assert inspect(str(stored_as.folder))["formats"] == inspect(str(stored_as.checkpoint))["formats"]


def test_an_artifact_with_rounded_activations_names_the_formats_of_its_checkpoint(rounded_to):
    assert EXPORTER.describe(rounded_to.folder).formats == {n: w.format for n, w in rounded_to.weights.items()}
    assert inspect(str(rounded_to.folder))["formats"] == inspect(str(rounded_to.checkpoint))["formats"]


def test_the_graph_uses_standard_operators_only(rounded_to):
    assert {node.domain for node in nodes_of(rounded_to.path)} == {""}


# what onnxruntime makes of it


def optimized_nodes(path: Path, folder: Path) -> list[onnx.NodeProto]:
    make_session(path, {}, folder / "optimized.onnx")
    return nodes_of(folder / "optimized.onnx")


def multiplied(applied: Applied) -> list[Weight]:
    """Every quantized matrix that is multiplied; an embedding is, where the head is tied."""
    tied = applied.model.config.tie_word_embeddings
    return [w for w in applied.weights.values() if w.is_quantized and (tied or w.name != EMBEDDING)]


def is_whole(weight: Weight) -> bool:
    return weight.format.startswith("int")


def test_onnxruntime_multiplies_every_integer_matrix_as_it_is_stored(stored_as, tmp_path):
    nodes = optimized_nodes(stored_as.path, tmp_path)
    found = [node for node in nodes if node.op_type == "MatMulNBits"]
    expected = [weight for weight in multiplied(stored_as) if is_whole(weight)]
    assert len(found) == len(expected)
    bits = [next(a.i for a in node.attribute if a.name == "bits") for node in found]
    assert sorted(bits) == sorted(expected_bits(weight) for weight in expected)


def test_onnxruntime_computes_once_at_load_what_depends_on_weights_alone(stored_as, tmp_path):
    """No Cast of a 16-bit weight, no -exp(A_log), no list of fp8 bytes is left to be computed at every step."""
    nodes = optimized_nodes(stored_as.path, tmp_path)
    made = {name for node in nodes for name in node.output}
    inputs = {value.name for value in onnx.load(stored_as.path, load_external_data=False).graph.input}
    constant = [n for n in nodes if not any(name in made or name in inputs for name in n.input) and n.op_type != "Scan"]
    outside_scan = [node for node in constant if not any(name.startswith("step_") for name in node.input)]
    assert {node.op_type for node in outside_scan} <= {
        "DequantizeLinear"
    }  # fp8 has no kernel that multiplies as stored
    if any(is_whole(w) for w in multiplied(stored_as)) and not any(
        w.format.startswith("fp8") for w in multiplied(stored_as)
    ):
        assert not outside_scan


def test_onnxruntime_multiplies_whole_numbers_where_both_sides_are(rounded_to, tmp_path):
    """The others keep MatMulNBits, which a DequantizeLinear of the input would prevent. Tied embeddings are dequantized
    alike in both uses."""
    counts, both, one = {}, 0, 0
    for node in optimized_nodes(rounded_to.path, tmp_path):
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    for weight in multiplied(rounded_to):
        whole = weight.activation is not None and weight.activation.format.endswith("int8") and weight.format in WHOLE
        both += whole and weight.name != EMBEDDING
        one += is_whole(weight) and not (whole and weight.name != EMBEDDING)
    assert both + one > 0 or all(not is_whole(weight) for weight in multiplied(rounded_to))
    whole_numbers = counts.get("MatMulInteger", 0) + counts.get("MatMulIntegerToFloat", 0)
    assert (whole_numbers, counts.get("MatMulNBits", 0)) == (both, one)


def test_an_input_that_several_matrices_share_is_rounded_once(rounded_to):
    """Query, key and value; gate and up. Two grids where a matrix beside int8 ones has another format."""
    model, groups = rounded_to.model, 0
    for index in range(model.config.num_hidden_layers):
        weights, layer = model.unit(f"layer.{index}").weights, model.layer(index)
        prefix = layer.prefix
        for group in (group for half in layer.residuals for level in half.block.levels() for group in level):
            inputs = [weights[prefix + name] for name in group.names]
            assert len({w.activation and w.activation.scale and w.activation.scale() for w in inputs}) == 1
            groups += len({w.format in WHOLE for w in inputs if w.activation})
    groups += (
        next(w for w in reversed(multiplied(rounded_to)) if w.role in (Role.LM_HEAD, Role.EMBEDDING)).activation
        is not None
    )
    assert sum(node.op_type == "QuantizeLinear" for node in nodes_of(rounded_to.path)) == groups


def test_onnxruntimes_symbolic_shape_inference_knows_every_shape(rounded_to, monkeypatch):
    assert_shapes_are_inferred(rounded_to.path, monkeypatch)


def test_onnxruntimes_symbolic_shape_inference_knows_every_shape_of_stored_weights(stored_as, monkeypatch):
    assert_shapes_are_inferred(stored_as.path, monkeypatch)


def test_no_product_has_two_dequantized_fp8_sides(rounded_to):
    """onnxruntime before 1.32 makes a product of whole numbers of them, and then refuses it."""
    nodes, weights = nodes_of(rounded_to.path), initializers(rounded_to.path)
    widened = {n.output[0]: n.input[0] for n in nodes if n.op_type == "DequantizeLinear"}
    for left, right in (node.input for node in nodes if node.op_type == "MatMul"):
        if left in widened and right in widened:
            assert weights[widened[right]].data_type != onnx.TensorProto.FLOAT8E4M3FN


def test_no_product_of_a_rotation_has_weights_on_its_left(tmp_path):
    """onnxruntime before 1.32 refuses them there where no row is on the right: an expert that no token chose."""
    weight = make_weight("int8", (24, 96), make_activation("static-int8"), hadamard.block_size(96))
    run_graph(tmp_path, make_inputs(96), 24, lambda graph, value: linear(graph, value, weight))
    reached, products = {"x"}, [n for n in nodes_of(tmp_path / "model.onnx") if n.op_type == "MatMul"]
    for node in nodes_of(tmp_path / "model.onnx"):
        if reached & set(node.input):
            reached |= set(node.output)
    assert len(products) == 3 and all(node.input[0] in reached for node in products)
