"""Graphs in forms that no recipe asks for yet: a range of layers, fixed dimensions, one token at a time; and states kept in
sixteen bits. What they give is what the whole graph, or our own forward, gives."""

from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from jamba_models import make_jamba
from onnx_graphs import Steps, all_graphs, wired
from stepping import own_logits

from compress.checkpoint.reader import Checkpoint
from compress.formats.remembered import Precision
from compress.model.blocks.attention import Attention
from compress.model.blocks.mamba1 import Mamba1
from compress.model.families.jamba import Jamba
from compress.model.hybrid import HybridModel
from compress.runtime.onnx_session import OnnxSession
from exporters.dialects.portable import Portable
from exporters.graph.form import Form

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
SAME = 1e-5  # the same graph in another form: float32 sums in another order at most
LENGTH, PROMPT = 12, 8


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request, tmp_path_factory) -> HybridModel:
    """Six layers: attention in the third, experts in the second and the fifth."""
    folder = tmp_path_factory.mktemp("model")
    return Checkpoint(make_jamba(folder, spread=0.7, tie_word_embeddings=request.param)).model


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return wired(model, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def ids() -> np.ndarray:
    return np.random.default_rng(3).integers(3, 67, (2, LENGTH))


@pytest.fixture
def mask() -> np.ndarray:
    """The second row begins with three places of padding."""
    mask = np.ones((2, LENGTH), np.int64)
    mask[1, :3] = 0
    return mask


def declared(values) -> dict[str, list]:
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


def graph_of(path) -> onnx.GraphProto:
    return onnx.load(path, load_external_data=False).graph


# stages


def run_chain(paths, ids, mask) -> np.ndarray:
    """A prompt and then token by token through graphs that hand on their hidden states."""
    stages, outputs = [Steps(path) for path in paths], []
    for end, piece in enumerate(np.split(ids, range(PROMPT, LENGTH), axis=1), PROMPT):
        for stage in stages:
            piece = stage.step(piece, mask[:, :end])
        outputs.append(piece)
    return np.concatenate(outputs, 1)


@pytest.mark.parametrize("ends", [(3, 6), (1, 5, 6)], ids=str)
def test_stages_give_one_after_the_other_what_the_whole_gives(model, whole, tmp_path, ids, mask, ends):
    spans = [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]
    paths = [wired(model, tmp_path / str(span.start), Form(span)) for span in spans]
    np.testing.assert_allclose(run_chain(paths, ids, mask), run_chain([whole], ids, mask), rtol=0, atol=SAME)


def test_a_stage_in_the_middle_has_its_own_layers_and_neither_end(model, tmp_path):
    path = wired(model, tmp_path / "stage", Form(range(2, 4)))
    graph, hidden = graph_of(path), ["batch_size", "sequence_length", 40]
    inputs, outputs = declared(graph.input), declared(graph.output)
    assert inputs.pop("hidden_states") == outputs.pop("last_hidden_state") == hidden
    assert {name.split(".")[1] for name in (inputs.keys() - {"attention_mask"}) | outputs.keys()} == {"2", "3"}
    stored = {tensor.name for tensor in graph.initializer if "." in tensor.name}
    assert stored == {name for index in (2, 3) for name in model.unit(f"layer.{index}").weights}


@pytest.mark.parametrize("layers", [range(4, 8), range(3, 3), range(0, 6, 2), range(-1, 3)])
def test_layers_that_are_no_stage_are_refused(model, tmp_path, layers):
    with pytest.raises(ValueError, match="no neighbouring layers of a model with 6"):
        wired(model, tmp_path / "stage", Form(layers))


# layers in other types


class Half(Portable):
    body_type = ir.DataType.FLOAT16


WIDE = {f"layer.{index}": ir.DataType.FLOAT for index in (2, 3)}


def types_of_products(path) -> list[int]:
    """Of every matrix product in order, scans aside."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output]}
    return [types.get(node.output[0], 0) for node in graph.node if node.op_type == "MatMul"]


def test_a_layer_may_be_in_another_type_than_its_neighbours(model, tmp_path, ids, mask):
    """In float32 everywhere, a graph of float16 is that of float32."""
    everywhere = {unit.name: ir.DataType.FLOAT for unit in model.units}
    half, some, every = (
        wired(model, tmp_path / str(number), dialect=Half, types=types)
        for number, types in enumerate([{}, WIDE, everywhere])
    )
    assert set(types_of_products(every)) == {FLOAT} and set(types_of_products(half)) == {FLOAT16}
    assert set(types_of_products(some)) == {FLOAT, FLOAT16}
    exact = run_chain([wired(model, tmp_path / "float")], ids, mask)
    np.testing.assert_array_equal(run_chain([every], ids, mask), exact)
    away = [np.abs(run_chain([path], ids, mask) - exact)[mask > 0].mean() for path in (half, some)]
    assert min(away) > 0 and max(away) < 2**-9


@pytest.mark.parametrize("ends", [(2, 6), (3, 6), (4, 6), (1, 3, 6)], ids=str)
def test_stages_hand_on_hidden_states_in_the_type_of_the_layer_that_takes_them(model, tmp_path, ids, mask, ends):
    spans = [range(start, end) for start, end in zip((0, *ends), ends, strict=False)]
    paths = [wired(model, tmp_path / str(span.start), Form(span), Half, WIDE) for span in spans]
    whole = run_chain([wired(model, tmp_path / "whole", dialect=Half, types=WIDE)], ids, mask)
    assert (
        np.abs(run_chain(paths, ids, mask) - whole)[mask > 0].max() < 2**-6
    )  # onnxruntime leaves casts out within a graph
    given = [graph_of(path).input[0].type.tensor_type.elem_type for path in paths[1:]]
    assert given == [FLOAT if f"layer.{span.start}" in WIDE else FLOAT16 for span in spans[1:]]
    assert given == [graph_of(path).output[0].type.tensor_type.elem_type for path in paths[:-1]]


def test_a_matrix_that_is_stored_once_is_in_one_type(model, tmp_path):
    types = {"head": ir.DataType.FLOAT}
    if not model.is_tied:
        wired(model, tmp_path / "head", dialect=Half, types=types)
        return
    with pytest.raises(ValueError, match="stored once"):
        wired(model, tmp_path / "head", dialect=Half, types=types)
    path = wired(model, tmp_path / "both", dialect=Half, types=types | {"embedding": ir.DataType.FLOAT})
    names = [tensor.name for tensor in graph_of(path).initializer]
    assert len(names) == len(set(names))


# fixed dimensions


def test_a_graph_of_fixed_sizes_says_so_everywhere_and_computes_the_same(model, whole, tmp_path, ids, mask):
    sizes = {"batch_size": 2, "sequence_length": LENGTH - PROMPT, "past_sequence_length": PROMPT}
    static = Steps(wired(model, tmp_path / "static", Form(sizes=sizes)))
    graph = graph_of(tmp_path / "static" / "model.onnx")
    shapes = declared([*graph.input, *graph.output])
    assert all(isinstance(size, int) for shape in shapes.values() for size in shape)
    assert (
        shapes["present.2.key"][2] == shapes["attention_mask"][1] == LENGTH
        and shapes["past_key_values.2.key"][2] == PROMPT
    )
    bodies = [declared(body.input) for body in list(all_graphs(graph))[1:]]
    assert bodies and all(shape[0] == 2 for body in bodies for shape in body.values())
    general = Steps(whole)
    general.step(ids[:, :PROMPT], mask[:, :PROMPT])
    static.states = list(general.states)
    expected = general.step(ids[:, PROMPT:], mask)
    np.testing.assert_allclose(static.step(ids[:, PROMPT:], mask), expected, rtol=0, atol=SAME)
    for ours, theirs in zip(static.states, general.states, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=SAME)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sizes": {"batch": 2}}, "'batch' is no dimension"),
        ({"sizes": {"sequence_length": 4}, "decode_only": True}, "takes one token"),
        ({"sizes": {"past_sequence_length": 4, "sequence_length": 1, "total_sequence_length": 6}}, "follows from"),
    ],
)
def test_sizes_that_fit_no_graph_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Form(**arguments)


# decode only


def test_a_graph_for_one_token_continues_as_the_general_one(model, whole, tmp_path, ids, mask):
    decode, general = Steps(wired(model, tmp_path / "decode", Form(decode_only=True))), Steps(whole)
    general.step(ids[:, :PROMPT], mask[:, :PROMPT])
    decode.states = list(general.states)
    for t in range(PROMPT, LENGTH):
        expected = general.step(ids[:, t : t + 1], mask[:, : t + 1])
        np.testing.assert_allclose(decode.step(ids[:, t : t + 1], mask[:, : t + 1]), expected, rtol=0, atol=SAME)


def test_a_graph_for_one_token_has_no_loop_over_tokens(model, tmp_path):
    graph = graph_of(wired(model, tmp_path / "decode", Form(decode_only=True)))
    assert not any(node.op_type == "Scan" for node in graph.node)
    assert declared(graph.input)["input_ids"] == ["batch_size", 1]


# states in other types


@dataclass(frozen=True)
class NarrowMamba(Mamba1):
    def states(self):
        return tuple(replace(spec, precision=Precision(KEPT_AS[spec.name])) for spec in super().states())


@dataclass(frozen=True)
class NarrowAttention(Attention):
    def states(self):
        return tuple(replace(spec, precision=Precision(KEPT_AS[spec.name])) for spec in super().states())


KEPT_AS = {"conv_state": "fp16", "recurrent_state": "bf16", "key": "bf16", "value": "fp16"}
NARROW = {Mamba1: NarrowMamba, Attention: NarrowAttention}


class NarrowJamba(Jamba):
    """A family whose states are kept in sixteen bits."""

    def layer(self, index):
        layer = super().layer(index)
        residuals = (
            replace(r, block=NARROW.get(type(r.block), type(r.block))(**vars(r.block))) for r in layer.residuals
        )
        return replace(layer, residuals=tuple(residuals))


def test_states_are_kept_between_calls_in_the_type_their_description_names(model, tmp_path, ids, mask):
    """A rounding of a state can go either way where it lies at a tie; that moves few logits, and by a part of what rounding
    does at all."""
    narrow = replace(model, architecture=NarrowJamba(model.config))
    path, cuts = wired(narrow, tmp_path / "narrow"), range(PROMPT, LENGTH + 1)
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph_of(path).input, *graph_of(path).output)}
    of = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    for name, kept in KEPT_AS.items():
        index = 2 if name in ("key", "value") else 0
        assert types[f"past_key_values.{index}.{name}"] == types[f"present.{index}.{name}"] == of[kept]
    expected, wide = (
        own_logits(m, torch.from_numpy(ids), cuts, torch.from_numpy(mask)).numpy() for m in (narrow, model)
    )
    generation, pieces = OnnxSession(path, threads=1).start(2), np.split(ids, range(PROMPT, LENGTH), axis=1)
    masks = np.split(mask, range(PROMPT, LENGTH), axis=1)
    actual = np.concatenate([generation.step(*both).copy() for both in zip(pieces, masks, strict=True)], 1)
    apart, rounding = (np.abs(expected - other)[mask == 1] for other in (actual, wide))
    assert rounding.mean() > 1e-4
    assert np.median(apart) < 1e-5 and apart.mean() < 0.1 * rounding.mean()
