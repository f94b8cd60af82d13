"""The `onnx` exporter: the graph keeps the contract, and onnxruntime computes from it what our own forward computes."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from jamba_models import make_jamba
from onnx_graphs import EXACT, all_graphs, assert_shapes_are_inferred
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compress.apply import exporting, pipeline
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError
from compress.prompts.windows import encode
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.recipe.source import load_tokenizer, resolve
from compress.runtime import memory
from compress.runtime.inference import Head, stream
from compress.runtime.onnx_session import OnnxSession
from exporters import onnx as exporter

EXPORTER = exporter.Onnx(exporter.Options())

AGREEMENT = 1e-3  # largest difference between logits: the project's requirement on an exported graph
SPREAD = 0.7  # see test_jamba_forward.py: keeps the noise of float32 itself far below the bound
BATCH = 3

# name: changes to models.py's shapes, whether the checkpoint is quantized before
VARIANTS = {
    "awkward": ({}, True),
    "tied": ({"tie_word_embeddings": True}, True),
    "no experts": ({"num_experts": 1}, True),
    "one expert a token": ({"num_experts_per_tok": 1}, True),
    "every expert for every token": ({"num_experts_per_tok": 3}, True),
    "no attention": ({"attn_layer_period": 8, "attn_layer_offset": 7}, True),
    "attention only": ({"attn_layer_period": 1, "attn_layer_offset": 0}, True),
    "as many key-value heads as query heads": ({"num_key_value_heads": 5}, True),
    "two groups of query heads": ({"num_attention_heads": 4, "num_key_value_heads": 2}, True),
    "head size apart from hidden size": ({"head_dim": 12}, True),
    "projection biases": ({"mamba_proj_bias": True}, True),
    "convolution without bias": ({"mamba_conv_bias": False}, True),
    "convolution of width 2": ({"mamba_d_conv": 2}, True),
    "large epsilon in the norms": ({"rms_norm_eps": 0.1}, True),
    "float": ({}, False),
    "float tied": ({"tie_word_embeddings": True}, False),
}


class Artifact:
    """An exported folder, the checkpoint it came from, and what our own forward computes from that."""

    def __init__(self, checkpoint: Path, folder: Path, scratch: Path):
        self.checkpoint, self.folder, self.path = checkpoint, folder, folder / "model.onnx"
        self.model, self.config = Checkpoint(checkpoint, allow_quantized=True).model, config_of(checkpoint)
        self._scratch = scratch
        self.session = OnnxSession(self.path, EXACT, threads=1)

    def own_logits(self, ids: np.ndarray) -> np.ndarray:
        head = Head(self.model, "cpu")
        blocks = stream(self.model, list(torch.from_numpy(ids)), self._scratch)
        return np.concatenate([head(hidden).numpy() for _, hidden in blocks])


def config_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text())


def quantized(source: Path, out: Path) -> Path:
    """An `apply` of the quick start's recipe; the folder has checkpoint/ and onnx/."""
    pipeline.apply(pipeline.Job(load_recipe("tiny-int8", ("check=null",)), resolve(str(source)), out))
    return out


def make_artifact(folder: Path, changes: dict, quantize: bool) -> Artifact:
    source, scratch = make_jamba(folder / "source", spread=SPREAD, **changes), folder / "scratch"
    scratch.mkdir()
    if quantize:
        out = quantized(source, folder / "out")
        return Artifact(out / "checkpoint", out / "onnx", scratch)
    return Artifact(source, exporting.export_checkpoint(source, "onnx", folder / "onnx"), scratch)


@pytest.fixture(scope="module", params=VARIANTS)
def artifact(request, tmp_path_factory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("variant"), *VARIANTS[request.param])


@pytest.fixture(scope="module")
def awkward(tmp_path_factory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("awkward"), *VARIANTS["awkward"])


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Artifact:
    return make_artifact(tmp_path_factory.mktemp("tied"), *VARIANTS["tied"])


@pytest.fixture(scope="module")
def reference(applied, tmp_path_factory) -> Artifact:
    return Artifact(applied / "checkpoint", applied / "onnx", tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def text(tiny) -> np.ndarray:
    """513 tokens of a held-out passage, [1, 513]."""
    passage = json.loads((resources.folder("calibration_data") / "heldout.jsonl").read_text().splitlines()[0])
    ids = encode(load_tokenizer(tiny), passage["text"] * 4)[:513]
    assert len(ids) == 513
    return np.array([ids])


def tokens(artifact: Artifact, length: int, batch: int = BATCH) -> np.ndarray:
    return np.random.default_rng(7).integers(3, artifact.config["vocab_size"], (batch, length))


def assert_agrees(actual: np.ndarray, expected: np.ndarray):
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= AGREEMENT


def in_pieces(generation, ids: np.ndarray, sizes) -> np.ndarray:
    assert sum(sizes) == ids.shape[1]
    cuts = list(itertools.accumulate(sizes))[:-1]
    return np.concatenate([generation.step(piece).copy() for piece in np.split(ids, cuts, axis=1)], 1)


# the graph


def load_graph(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def declared(values) -> dict[str, tuple]:
    """Name -> element type and dimensions, symbolic ones by their name."""
    types = {value.name: value.type.tensor_type for value in values}
    return {
        name: (onnx.TensorProto.DataType.Name(t.elem_type), [d.dim_param or d.dim_value for d in t.shape.dim])
        for name, t in types.items()
    }


def contract_states(config: dict, prefix: str, length: str) -> dict[str, tuple]:
    """The contract's states of a Jamba configuration, written out from its keys."""
    inner, states = config["mamba_expand"] * config["hidden_size"], {}
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for n in range(config["num_hidden_layers"]):
        if n % config["attn_layer_period"] == config["attn_layer_offset"]:
            shape = ["batch_size", config["num_key_value_heads"], length, head]
            states |= {f"{prefix}.{n}.key": shape, f"{prefix}.{n}.value": shape}
        else:
            states[f"{prefix}.{n}.conv_state"] = ["batch_size", inner, config["mamba_d_conv"] - 1]
            states[f"{prefix}.{n}.recurrent_state"] = ["batch_size", config["mamba_d_state"], inner]
    return {name: ("FLOAT", shape) for name, shape in states.items()}


def assert_keeps_the_contract(artifact: Artifact):
    graph, config = load_graph(artifact.path).graph, artifact.config
    assert declared(graph.input) == {
        "input_ids": ("INT64", ["batch_size", "sequence_length"]),
        "attention_mask": ("INT64", ["batch_size", "total_sequence_length"]),
        **contract_states(config, "past_key_values", "past_sequence_length"),
    }
    assert declared(graph.output) == {
        "logits": ("FLOAT", ["batch_size", "sequence_length", config["vocab_size"]]),
        **contract_states(config, "present", "total_sequence_length"),
    }


def test_inputs_and_outputs_are_those_of_the_contract(artifact):
    assert_keeps_the_contract(artifact)


def test_inputs_and_outputs_of_the_reference_model_are_those_of_the_contract(reference):
    assert_keeps_the_contract(reference)


def test_the_graph_uses_standard_operators_of_opset_21_only(artifact):
    model = load_graph(artifact.path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert {node.domain for graph in all_graphs(model.graph) for node in graph.node} == {""}
    assert not model.functions


def test_the_onnx_checker_accepts_the_graph_with_its_shapes(artifact):
    onnx.checker.check_model(artifact.path, full_check=True)


def test_options_other_than_opset_21_are_refused():
    with pytest.raises(ValidationError):
        exporter.Options(opset=20)


# stored weights


def external(path: Path) -> dict[str, onnx.TensorProto]:
    graphs = all_graphs(load_graph(path).graph)
    tensors = (tensor for graph in graphs for tensor in graph.initializer)
    return {t.name: t for t in tensors if t.data_location == onnx.TensorProto.EXTERNAL}


def place(tensor: onnx.TensorProto) -> SimpleNamespace:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return SimpleNamespace(file=entries["location"], offset=int(entries["offset"]), length=int(entries["length"]))


def stored(path: Path, tensor: onnx.TensorProto) -> np.ndarray:
    where, dtype = place(tensor), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = where.length // dtype.itemsize
    return np.fromfile(path.parent / where.file, dtype, count, offset=where.offset).reshape(tensor.dims)


def checkpoint_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the shards, read by the safetensors library; bfloat16 widened."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                tensors[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return tensors


def unpacked(tensors: dict[str, np.ndarray], stem: str) -> np.ndarray:
    """compressed-tensors' pack-quantized by its definition: value k of a row is byte k % 4 of word k // 4, less 128."""
    words, (rows, columns) = tensors[stem + "_packed"].astype(np.int64), tensors[stem + "_shape"]
    values = [(words[:, k // 4] >> (8 * (k % 4)) & 0xFF) - 128 for k in range(columns)]
    return np.stack(values, 1).reshape(rows, columns).astype(np.int8)


EMBEDDING = "model.embed_tokens.weight"


def assert_int8_weights_are_the_checkpoints(artifact: Artifact):
    source, tensors = checkpoint_tensors(artifact.checkpoint), external(artifact.path)
    names = [name.removesuffix("_packed") for name in source if name.endswith(".weight_packed")]
    assert len(names) > 20
    for name in names:
        expected = unpacked(source, name)  # [N, K]
        assert tensors[name].data_type == onnx.TensorProto.INT8
        assert np.array_equal(stored(artifact.path, tensors[name]), expected if name == EMBEDDING else expected.T), name
        scales = stored(artifact.path, tensors[name + "_scale"])
        assert np.array_equal(scales, source[name + "_scale"][:, 0]), name


def test_int8_weights_are_the_checkpoints_values_stored_with_inputs_first(awkward):
    assert_int8_weights_are_the_checkpoints(awkward)


def test_int8_weights_of_the_reference_model_are_the_checkpoints_values(reference):
    assert_int8_weights_are_the_checkpoints(reference)


def test_int8_weights_of_a_tied_model_are_the_checkpoints_values(tied):
    assert_int8_weights_are_the_checkpoints(tied)


def test_a_tied_embedding_is_stored_once(tied):
    size = tied.config["vocab_size"] * tied.config["hidden_size"]
    assert [t.name for t in external(tied.path).values() if np.prod(t.dims) == size] == [EMBEDDING]


def expected_plain(name: str, tensor: np.ndarray) -> np.ndarray:
    """In which form a tensor that is not quantized belongs in the graph."""
    if name.endswith("conv1d.weight"):
        return tensor[:, 0].T
    return tensor.T if tensor.ndim == 2 and name != EMBEDDING else tensor


@pytest.mark.parametrize("changes", [{}, {"mamba_proj_bias": True}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_that_are_not_quantized_are_stored_as_they_are(tmp_path, dtype, changes):
    source = make_jamba(tmp_path / "source", getattr(torch, dtype), **changes)
    path = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx") / "model.onnx"
    expected, tensors = checkpoint_tensors(source), external(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        actual = stored(path, tensor)
        assert actual.dtype.name == dtype
        assert np.array_equal(actual.astype(np.float32), expected_plain(name, expected[name])), name


def test_every_weight_is_external_and_what_the_graph_itself_holds_does_not_grow_with_the_model(artifact):
    graphs = list(all_graphs(load_graph(artifact.path).graph))
    inline = [t for graph in graphs for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    inline += [a.t for graph in graphs for node in graph.node for a in node.attribute if a.HasField("t")]
    assert all(np.prod(tensor.dims, initial=1) <= 8 for tensor in inline)  # shapes, axes and numbers of experts
    assert len({place(tensor).file for tensor in external(artifact.path).values()}) == 1


def assert_data_file_is_packed(path: Path):
    """Back to back, each at the next multiple of 64 bytes, or of a page from 1 MiB on; nothing after the last."""
    end = 0
    for where in sorted(map(place, external(path).values()), key=lambda where: where.offset):
        alignment = 4096 if where.length >= 1 << 20 else 64
        assert where.offset == -(-end // alignment) * alignment
        end = where.offset + where.length
    assert (path.parent / "model.onnx.data").stat().st_size == end


def test_the_data_file_holds_the_weights_and_their_alignment_only(artifact):
    assert_data_file_is_packed(artifact.path)


def test_weights_of_a_mebibyte_begin_on_a_page(tmp_path):
    """An embedding of 16384 x 40 bfloat16 is 1.25 MiB."""
    source = make_jamba(tmp_path / "source", vocab_size=16384, num_hidden_layers=1)
    path = exporting.export_checkpoint(source, "onnx", tmp_path / "onnx") / "model.onnx"
    assert_data_file_is_packed(path)
    assert place(external(path)["lm_head.weight"]).offset % 4096 == 0


def test_the_predicted_size_is_the_size_of_the_data(artifact):
    predicted = EXPORTER.predict_bytes(artifact.model.units)
    alignment = (artifact.folder / "model.onnx.data").stat().st_size - predicted
    assert 0 <= alignment < 64 * len(external(artifact.path))


def test_the_description_of_an_artifact_is_read_from_it(reference):
    described, source = EXPORTER.describe(reference.folder), checkpoint_tensors(reference.checkpoint)
    assert described.bytes(reference.folder) == sum(
        (reference.folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data", "genai_config.json")
    )
    assert described.weight_bytes == sum(place(t).length for t in external(reference.path).values())
    int8 = {name.removesuffix("_packed") for name in source if name.endswith("_packed")}
    assert {name for name, number_format in described.formats.items() if number_format == "int8"} == int8
    assert {described.formats[name] for name in described.formats.keys() - int8} == {"bf16"}


def test_exporting_twice_gives_the_same_bytes(awkward, tmp_path):
    again = exporting.export_checkpoint(awkward.checkpoint, "onnx", tmp_path / "again")
    assert {p.name for p in again.iterdir()} == {p.name for p in awkward.folder.iterdir()}
    for path in again.iterdir():
        assert path.read_bytes() == (awkward.folder / path.name).read_bytes(), path.name


def test_an_artifact_works_where_it_is_copied_to(awkward, tmp_path):
    for path in awkward.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ids = tokens(awkward, 7)
    assert_agrees(OnnxSession(tmp_path / "model.onnx", EXACT).start(BATCH).step(ids), awkward.own_logits(ids))


def test_the_tokenizer_goes_with_the_reference_artifact(reference, tiny):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (reference.folder / name).read_bytes() == (tiny / name).read_bytes()


@pytest.mark.parametrize("name", ["awkward", "tied"])
def test_progress_adds_up_to_the_parameters(request, tmp_path, name):
    artifact, done = request.getfixturevalue(name), []
    EXPORTER.export(Checkpoint(artifact.checkpoint, allow_quantized=True), tmp_path, done.append)
    assert sum(done) == artifact.model.parameters


# what onnxruntime makes of it


def optimized(path: Path, folder: Path) -> onnx.ModelProto:
    """The graph as onnxruntime runs it, after all its optimizations."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.optimized_model_filepath = str(folder / "optimized.onnx")
    settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
    ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return load_graph(folder / "optimized.onnx")


def assert_every_matrix_is_fused(artifact: Artifact, folder: Path):
    """Every int8 matrix is multiplied as it is stored, but for the embedding, whose rows are looked up."""
    graphs = list(all_graphs(optimized(artifact.path, folder).graph))
    nodes = [node for graph in graphs for node in graph.node]
    source = checkpoint_tensors(artifact.checkpoint)
    matrices = {name.removesuffix("_packed") for name in source if name.endswith(".weight_packed")}
    if not artifact.config["tie_word_embeddings"]:
        matrices.remove(EMBEDDING)
    assert len(matrices) > 20
    assert sum(node.op_type == "MatMulNBits" for node in nodes) == len(matrices)
    assert not [node.name for node in nodes if node.op_type == "DequantizeLinear"]


def test_onnxruntime_fuses_every_int8_matrix(artifact, tmp_path):
    if any(name.endswith("_packed") for name in checkpoint_tensors(artifact.checkpoint)):
        assert_every_matrix_is_fused(artifact, tmp_path)


def test_onnxruntime_fuses_every_int8_matrix_of_the_reference_model(reference, tmp_path):
    assert_every_matrix_is_fused(reference, tmp_path)


def test_onnxruntime_fuses_every_int8_matrix_of_a_model_of_common_sizes_tied(tmp_path):
    """Sizes that are multiples of 32, as those of published models."""
    changes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
    artifact = make_artifact(tmp_path, changes | {"tie_word_embeddings": True}, True)
    assert_every_matrix_is_fused(artifact, tmp_path)


# numbers: variants


def test_whole_sequences_give_the_logits_of_our_own_forward(artifact):
    ids = tokens(artifact, 70)
    expected = artifact.own_logits(ids)
    assert_agrees(artifact.session.start(BATCH).step(ids), expected)
    assert_agrees(artifact.session.start(1).step(ids[:1, :1]), expected[:1, :1])


def test_prefill_in_pieces_and_decode_give_the_logits_of_our_own_forward(artifact):
    ids = tokens(artifact, 70)
    logits = in_pieces(artifact.session.start(BATCH), ids, [2, 31, 1, 28, *[1] * 8])
    assert_agrees(logits, artifact.own_logits(ids))


def test_token_by_token_from_nothing_gives_the_logits_of_our_own_forward(artifact):
    ids = tokens(artifact, 20)
    assert_agrees(in_pieces(artifact.session.start(BATCH), ids, [1] * 20), artifact.own_logits(ids))


def left_padded(ids: np.ndarray, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Each row's first tokens pushed to the right; the padding before them is token 5, any other would do."""
    width = max(lengths)
    mask = np.array([[0] * (width - length) + [1] * length for length in lengths])
    padded = np.full((len(ids), width), 5)
    for row, length in enumerate(lengths):
        padded[row, width - length :] = ids[row, :length]
    return padded, mask


def assert_real_tokens_agree(logits: np.ndarray, lengths: list[int], expected: np.ndarray):
    assert np.isfinite(logits).all()
    for row, length in enumerate(lengths):
        assert_agrees(logits[row, -length:], expected[row, :length])


def test_left_padded_rows_give_what_each_gives_alone_and_decode_on(artifact):
    """A left-padded prefill, four tokens more for every row one by one, then three at once."""
    lengths, ids = [40, 9, 1], tokens(artifact, 47)
    padded, mask = left_padded(ids, lengths)
    generation = artifact.session.start(BATCH)
    logits = [generation.step(padded, mask).copy()]
    following = np.stack([ids[row, n : n + 7] for row, n in enumerate(lengths)])
    logits += [generation.step(following[:, t : t + 1]).copy() for t in range(4)]
    logits.append(generation.step(following[:, 4:]))
    assert_real_tokens_agree(np.concatenate(logits, 1), [n + 7 for n in lengths], artifact.own_logits(ids))


def test_padding_wider_than_the_first_piece_is_carried_on(artifact):
    lengths, ids = [40, 9, 1], tokens(artifact, 40)
    padded, mask = left_padded(ids, lengths)
    generation, logits = artifact.session.start(BATCH), []
    for piece in (slice(0, 20), slice(20, 21), slice(21, 40)):
        logits.append(generation.step(padded[:, piece], mask[:, piece]).copy())
    assert_real_tokens_agree(np.concatenate(logits, 1), lengths, artifact.own_logits(ids))


def test_padding_leaves_the_ssm_states_as_they_were(awkward):
    session = ort.InferenceSession(awkward.path, providers=["CPUExecutionProvider"])
    g, feeds = np.random.default_rng(0), {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else {"batch_size": 2}.get(size, 0) for size in value.shape]
        feeds[value.name] = g.standard_normal(shape).astype(np.float32)
    feeds |= {"input_ids": np.full((2, 5), 4), "attention_mask": np.zeros((2, 5), np.int64)}
    names = [n for n in (value.name for value in session.get_outputs()) if n.endswith("recurrent_state")]
    for name, present in zip(names, session.run(names, feeds), strict=True):
        assert np.array_equal(present, feeds[name.replace("present", "past_key_values")])


def test_generations_of_one_session_do_not_share_their_states(awkward):
    ids = tokens(awkward, 40)
    expected = awkward.own_logits(ids)
    first, second = awkward.session.start(BATCH), awkward.session.start(2)
    first.step(ids[:, :30])
    assert_agrees(second.step(ids[1:, :5]), expected[1:, :5])
    assert_agrees(first.step(ids[:, 30:]), expected[:, 30:])


# numbers: the reference model


@pytest.mark.parametrize("length", [1, 7, 64, 513])
def test_prefill_of_the_reference_model_gives_the_logits_of_our_own_forward(reference, text, length):
    ids = text[:, :length]
    assert_agrees(reference.session.start(1).step(ids), reference.own_logits(ids))


@pytest.mark.parametrize("sizes", [(300, 213), (1, 512), (512, 1)])
def test_prefill_of_the_reference_model_in_two_pieces_gives_the_same(reference, text, sizes):
    assert_agrees(in_pieces(reference.session.start(1), text, sizes), reference.own_logits(text))


def test_decode_of_the_reference_model_gives_the_logits_of_our_own_forward(reference, text):
    ids = text[:, :128]
    assert_agrees(in_pieces(reference.session.start(1), ids, [96, *[1] * 32]), reference.own_logits(ids))


def test_left_padded_batches_of_the_reference_model_give_what_each_row_gives_alone(reference, text):
    rows = np.concatenate([text[:, start : start + 100] for start in (0, 100, 200)])
    lengths = [90, 64, 3]
    padded, mask = left_padded(rows, lengths)
    generation = reference.session.start(3)
    logits = [generation.step(padded, mask).copy()]
    following = np.stack([rows[i, n : n + 10] for i, n in enumerate(lengths)])
    logits += [generation.step(following[:, t : t + 1]).copy() for t in range(10)]
    assert_real_tokens_agree(np.concatenate(logits, 1), [n + 10 for n in lengths], reference.own_logits(rows))


def test_experts_without_a_token_do_not_disturb_the_others(reference):
    """One token leaves six of eight experts with nothing; over these tokens every expert is among the six at times."""
    ids = np.arange(3, 43).reshape(-1, 1)
    expected = reference.own_logits(ids)
    for row in range(len(ids)):
        assert_agrees(reference.session.start(1).step(ids[row : row + 1]), expected[row : row + 1])


def with_an_idle_expert(source: Path) -> Path:
    """Expert 1's router row becomes the mean of the others', so that with top-1 it never wins; its weights are huge."""
    tensors, prefix = load_file(source / "model.safetensors"), "model.layers.1.feed_forward."
    router = tensors[prefix + "router.weight"]
    router[1] = (router[0] + router[2]) / 2
    for name in (name for name in tensors if name.startswith(prefix + "experts.1.")):
        tensors[name] *= 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_an_expert_that_no_token_chooses_changes_nothing(tmp_path):
    source = make_jamba(tmp_path / "source", spread=SPREAD, num_experts_per_tok=1, num_hidden_layers=3)
    before = exporting.export_checkpoint(source, "onnx", tmp_path / "before") / "model.onnx"
    after = exporting.export_checkpoint(with_an_idle_expert(source), "onnx", tmp_path / "after") / "model.onnx"
    artifact = Artifact(source, after.parent, tmp_path)
    ids = tokens(artifact, 30)
    expected = artifact.own_logits(ids)
    assert np.abs(OnnxSession(before).start(BATCH).step(ids) - expected).max() > 0.1  # it was chosen before
    assert_agrees(artifact.session.start(BATCH).step(ids), expected)


def kl_divergence(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), -1) for logits in (expected, actual))
    return (p.exp() * (p - q)).sum(-1).numpy()


def test_the_default_session_stays_close_to_our_own_forward(reference, text):
    """By default onnxruntime rounds the inputs of int8 products to 8 bits, about 0.5 % in each (reference/runtime.md).

    Errors of 141 products in 8 residual layers add up like their roots to 1 % or so of the logits; 4 % leaves room for
    other processors' kernels. KL goes with the square: the reference model's card has 0.0005 for such a graph, in all.
    """
    expected = reference.own_logits(text)
    actual = OnnxSession(reference.path, threads=1).start(1).step(text)
    assert np.linalg.norm(actual - expected) <= 0.04 * np.linalg.norm(expected)
    assert kl_divergence(expected, actual).mean() <= 0.0015  # the quick start's limit on the whole change


# refusals


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        OnnxSession(tmp_path / "model.onnx")


def test_a_file_that_is_not_onnx_is_refused(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a readable ONNX model"):
        OnnxSession(tmp_path / "model.onnx")


def test_a_graph_that_is_not_a_decoder_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info
    x, y = value("x", onnx.TensorProto.FLOAT, [1]), value("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(InputError, match="input_ids"):
        OnnxSession(tmp_path / "model.onnx")


def test_an_artifact_whose_data_file_is_missing_is_refused(awkward, tmp_path):
    (tmp_path / "model.onnx").write_bytes(awkward.path.read_bytes())
    with pytest.raises(InputError, match="cannot load"):
        OnnxSession(tmp_path / "model.onnx")


def test_an_artifact_larger_than_free_memory_is_refused_before_it_is_loaded(awkward, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(InputError, match="memory"):
        OnnxSession(awkward.path)


@pytest.mark.parametrize(("kind", "named"), [("onxn", "did you mean 'onnx'"), ("gguf", "no such exporter")])
def test_an_unknown_exporter_is_refused(awkward, tmp_path, kind, named):
    with pytest.raises(InputError, match=named):
        exporting.export_checkpoint(awkward.checkpoint, kind, tmp_path / "out")


def test_an_export_over_something_that_exists_is_refused(awkward, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        exporting.export_checkpoint(awkward.checkpoint, "onnx", tmp_path)


def test_an_export_that_fails_leaves_nothing_under_the_final_name(awkward, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("exporters.graph.builder.WeightFile.add", full)
    with pytest.raises(OSError, match="No space"):
        exporting.export_checkpoint(awkward.checkpoint, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# what other tools make of it


def test_no_body_takes_more_than_weights_from_outside(artifact):
    """OpenVINO counts a computed value as a missing input of the operator."""
    graph, *bodies = all_graphs(load_graph(artifact.path).graph)
    assert len(bodies) == sum(node.op_type == "Scan" for node in graph.node)
    for body in bodies:
        own = {value.name for value in (*body.input, *graph.initializer)} | {o for n in body.node for o in n.output}
        assert {name for node in body.node for name in node.input} <= own


def test_onnxruntimes_symbolic_shape_inference_knows_every_shape(artifact, monkeypatch):
    assert_shapes_are_inferred(artifact.path, monkeypatch)
