"""Opening checkpoint folders: tensors come out as the `safetensors` library reads them, and whatever must not be read is
refused with one sentence that names the file and the tensor or key."""

import contextlib
import itertools
import json
import os
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from jamba_models import make_jamba
from refusals import refusal
from safetensors.torch import load_file, save_file
from transformers import JambaConfig

from compress.checkpoint.folder import INDEX, SINGLE, WeightFolder
from compress.checkpoint.reader import Checkpoint, open_config
from compress.checkpoint.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from compress.errors import InputError
from compress.model import weight as model_module
from compress.model.block import Layer
from compress.studies import inspection

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.final_layernorm.weight"
FORMAT_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@pytest.fixture
def folder(small, tmp_path) -> Path:
    """A copy of the small model, one file, that a test may damage."""
    return Path(shutil.copytree(small, tmp_path / "model"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return make_jamba(tmp_path_factory.mktemp("sharded"), shards="20KB")


@pytest.fixture
def shards(sharded, tmp_path) -> Path:
    """A copy of the sharded model that a test may damage."""
    return Path(shutil.copytree(sharded, tmp_path / "model"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return make_jamba(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def refused(folder: Path, *named) -> None:
    """Opening the folder is refused, and the sentence names all of `named`."""
    message = refusal(lambda: Checkpoint(folder))
    assert [str(word) for word in named if str(word) not in message] == [], message


def weights(folder: Path, **options) -> dict:
    return {weight.name: weight for weight in Checkpoint(folder, **options).model.weights}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder as the safetensors library reads them."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weight_map(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


# ---- what comes out


@pytest.mark.parametrize("dtype", FORMAT_NAMES)
@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_every_tensor_comes_out_as_the_safetensors_library_reads_it(tmp_path, dtype, shard_size):
    folder = make_jamba(tmp_path, dtype=dtype, shards=shard_size)
    assert (folder / INDEX).is_file() == (shard_size is not None)
    expected, found = stored(folder), weights(folder)
    assert set(found) == set(expected)
    for name, weight in found.items():
        assert weight.format == FORMAT_NAMES[dtype], name
        assert torch.equal(weight.load(None), expected[name]), name
        assert torch.equal(weight.dense(), expected[name].to(torch.float32)), name  # exact: float32 holds all three


def test_blocks_of_rows_joined_are_the_whole_tensor(small, monkeypatch):
    monkeypatch.setattr(model_module, "BLOCK_BYTES", 1000)
    for name, weight in weights(small).items():
        blocks = list(weight.row_blocks())
        assert torch.equal(torch.cat([weight.dense(rows) for rows in blocks]), weight.dense()), name
        assert all(rows.stop - rows.start == 1 or weight.dense(rows).nbytes <= 1000 for rows in blocks), name
    assert len(list(weights(small)[EMBEDDING].row_blocks())) > 1


@pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 9), slice(66, 67), slice(0, 67)])
def test_rows_of_the_embedding_are_read_from_their_own_place_in_the_file(folder, rows):
    def spoil_other_rows(tensors):
        tensors[EMBEDDING][: rows.start] = float("nan")
        tensors[EMBEDDING][rows.stop :] = float("nan")

    expected = load_file(folder / SINGLE)[EMBEDDING][rows]
    change_tensors(folder, spoil_other_rows)
    assert torch.equal(weights(folder)[EMBEDDING].load(rows), expected)  # the NaN around them were not read


def test_a_hub_snapshot_of_links_opens_like_the_files_themselves(sharded, tmp_path):
    for path in sharded.iterdir():
        (tmp_path / path.name).symlink_to(path)
    found = weights(tmp_path)
    assert torch.equal(found[NORM].load(None), stored(sharded)[NORM])


def test_a_pickle_beside_safetensors_is_never_opened(folder):
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert set(weights(folder)) == set(stored(folder))


def test_defaults_of_an_empty_config_are_those_of_transformers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "jamba"}')
    ours = open_config(tmp_path)[0].config
    reference = JambaConfig()
    for name in type(ours).model_fields.keys() - {"compress"}:  # a section of ours
        expected = getattr(reference, name, None)
        assert (ours.dt_rank if name == "mamba_dt_rank" else getattr(ours, name)) == expected, name


def test_null_key_value_heads_mean_one_per_query_head(folder):
    """As transformers 4 read it; transformers 5 refuses null, so there is nothing to compare with."""
    change_json(folder / "config.json", num_key_value_heads=None)
    config = open_config(folder)[0].config
    assert config.num_key_value_heads == config.num_attention_heads == 5


# ---- which files


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_a_folder_of_pickles_is_refused_and_nothing_in_it_runs(folder, name):
    class Trap:
        def __reduce__(self):
            return Path.touch, (folder / "ran",)

    (folder / SINGLE).unlink()
    (folder / name).write_bytes(pickle.dumps(Trap()))
    refused(folder, folder / name, "pickle", "safetensors")
    assert not (folder / "ran").exists()


def test_a_folder_without_weights_is_refused(folder):
    (folder / SINGLE).unlink()
    refused(folder, folder, SINGLE, INDEX)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "absent.safetensors", "model.bin", "..", "", 7, None,
     ["x.safetensors"], {}, "x\0.safetensors", "x" * 300 + ".safetensors"],
    ids=lambda name: ascii(name)[:24],
)  # fmt: skip
def test_an_index_may_only_name_files_that_lie_in_the_folder(shards, name):
    shutil.copy(shards / "model-00001-of-00018.safetensors", shards.parent / "x.safetensors")
    change_weight_map(shards, lambda weight_map: weight_map.update({NORM: name}))
    refused(shards, shards / INDEX, name)


def test_an_index_may_not_name_an_absolute_path_even_of_its_own_file(shards):
    def make_absolute(weight_map):
        weight_map[NORM] = str(shards / weight_map[NORM])

    change_weight_map(shards, make_absolute)
    refused(shards, shards / INDEX, f"'{shards}")


def test_an_index_whose_file_was_not_downloaded_is_refused(shards):
    (shards / "model-00003-of-00018.safetensors").unlink()
    refused(shards, shards / INDEX, "model-00003-of-00018.safetensors", "missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}'])
def test_an_index_that_maps_nothing_is_refused(shards, text):
    (shards / INDEX).write_text(text)
    refused(shards, shards / INDEX)


def other_shard(folder: Path, name: str) -> str:
    """A shard that does not hold the tensor."""
    return next(path.name for path in sorted(folder.glob("*.safetensors")) if name not in load_file(path))


def test_a_tensor_listed_in_the_wrong_file_is_refused(shards):
    wrong = other_shard(shards, NORM)
    change_weight_map(shards, lambda weight_map: weight_map.update({NORM: wrong}))
    refused(shards, shards / INDEX, NORM, wrong)


def test_a_tensor_listed_but_in_no_file_is_refused(shards):
    change_weight_map(shards, lambda weight_map: weight_map.update({"model.ghost": weight_map[NORM]}))
    refused(shards, shards / INDEX, "model.ghost")


def test_a_tensor_in_a_file_but_unlisted_is_refused(shards):
    holder = json.loads((shards / INDEX).read_text())["weight_map"][NORM]
    change_weight_map(shards, lambda weight_map: weight_map.pop(NORM))
    refused(shards, shards / holder, NORM, INDEX)


def test_a_tensor_in_two_files_is_refused(shards):
    twin = shards / other_shard(shards, NORM)
    save_file(load_file(twin) | {NORM: stored(shards)[NORM]}, twin)
    refused(shards, NORM, twin.name)


# ---- which tensors


def test_a_missing_tensor_is_named_with_its_shape(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mamba.x_proj.weight"))
    refused(folder, folder, "model.layers.1.mamba.x_proj.weight", "missing", [24, 80])


def test_an_untied_model_needs_its_head(folder):
    change_tensors(folder, lambda tensors: tensors.pop(HEAD))
    refused(folder, folder, HEAD)


def test_an_unexpected_tensor_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.vision.weight": torch.zeros(1)}))
    refused(folder, folder / SINGLE, "model.vision.weight")


@pytest.mark.parametrize("change", [lambda t: t.T.contiguous(), lambda t: t[:-1], lambda t: t[None], lambda t: t[0, 0]])
def test_a_misshapen_tensor_is_named_with_both_shapes(folder, change):
    name = "model.layers.2.self_attn.k_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name]).clone()}))
    refused(folder, folder / SINGLE, name, [8, 40], list(load_file(folder / SINGLE)[name].shape))


@pytest.mark.parametrize("dtype, said", [
    (torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.int64, "I64"), (torch.bool, "BOOL"),
])  # fmt: skip
def test_a_tensor_of_a_type_that_is_no_plain_weight_is_named(folder, dtype, said):
    change_tensors(folder, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
    refused(folder, folder / SINGLE, NORM, said)


@pytest.mark.parametrize("section", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "compressed-tensors"}, {}])
def test_an_already_quantized_model_is_refused_as_a_source(folder, section):
    change_json(folder / "config.json", quantization_config=section)
    refused(folder, folder / "config.json", "quantization_config", "already quantized")


def test_a_head_beside_tied_embeddings_that_repeats_them_is_accepted(tied, tmp_path):
    folder = Path(shutil.copytree(tied, tmp_path / "model"))
    change_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert set(weights(folder)) == set(weights(tied))


def differ_in_last_value(embedding):
    embedding[-1, -1] += 1
    return embedding


@pytest.mark.parametrize("change", [differ_in_last_value, lambda head: head[:-1], lambda head: head.T.contiguous()])
@pytest.mark.parametrize("block_bytes", [64 << 20, 1000])
def test_a_head_beside_tied_embeddings_that_differs_is_refused(tied, tmp_path, monkeypatch, change, block_bytes):
    monkeypatch.setattr(model_module, "BLOCK_BYTES", block_bytes)
    folder = Path(shutil.copytree(tied, tmp_path / "model"))
    change_tensors(folder, lambda tensors: tensors.update({HEAD: change(tensors[EMBEDDING].clone()).clone()}))
    refused(folder, folder / SINGLE, HEAD, "tie_word_embeddings")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NORM, EMBEDDING, "model.layers.0.mamba.A_log", "model.layers.0.mamba.conv1d.bias"])
def test_weights_that_are_not_finite_are_named_when_read(folder, value, name):
    def spoil(tensors):
        tensors[name].view(-1)[-1] = value

    change_tensors(folder, spoil)
    weight = weights(folder)[name]
    message = refusal(weight.dense)
    assert str(folder / SINGLE) in message and f"'{name}'" in message


# ---- damaged files


@pytest.mark.parametrize("kept", [0, 4, 8, 1000, -1, -5000])
def test_a_truncated_file_is_refused_before_anything_is_read(folder, kept):
    path = folder / SINGLE
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    refused(folder, path, "truncated")


def test_a_file_cut_short_after_it_was_opened_is_noticed_when_read(folder):
    weight = weights(folder)[HEAD]
    header_bytes = int.from_bytes((folder / SINGLE).read_bytes()[:8], "little")
    os.truncate(folder / SINGLE, 8 + header_bytes)
    message = refusal(weight.dense)
    assert str(folder / SINGLE) in message and HEAD in message and "truncated" in message


def raw_file(path: Path, header: dict | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file from its parts, however wrong they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pair(**second) -> dict:
    """A header of two tensors of 8 bytes, `first` and `second`, with keys of the second replaced."""
    return {"first": entry(0, 8), "second": entry(8, 16) | second}


def test_the_two_tensor_file_the_next_tests_damage_is_sound(tmp_path):
    file = SafetensorsFile(raw_file(tmp_path / "x.safetensors", pair(), struct.pack("<4f", 1, 2, 3, 4)))
    assert file.read("second").tolist() == [3, 4]
    assert file.read("second", slice(1, 2)).tolist() == [4]


HUGE = [10**4000, 10**4000]  # their product has more digits than Python prints
WRONG_ENTRIES = {
    "overlapping the one before": ({"data_offsets": [4, 12]}, 12),
    "the same bytes as the one before": ({"data_offsets": [0, 8]}, 8),
    "reversed offsets": ({"data_offsets": [16, 8]}, 16),
    "offsets longer than the shape": ({"data_offsets": [8, 20]}, 20),
    "offsets shorter than the shape": ({"data_offsets": [8, 12]}, 12),
    "a gap before it": ({"data_offsets": [12, 20]}, 20),
    "a gap as wide as the address space": ({"data_offsets": [2**63, 2**63 + 8]}, 16),
    "negative offsets": ({"data_offsets": [-8, 0]}, 16),
    "offsets that are floats": ({"data_offsets": [8.0, 16.0]}, 16),
    "one offset": ({"data_offsets": [8]}, 16),
    "three offsets": ({"data_offsets": [8, 16, 24]}, 16),
    "no offsets": ({"data_offsets": None}, 16),
    "a negative shape": ({"shape": [-2]}, 16),
    "a shape with a boolean": ({"shape": [2, True]}, 16),
    "a shape with a string": ({"shape": ["2"]}, 16),
    "a shape that is a number": ({"shape": 2}, 16),
    "a shape beyond all memory": ({"shape": [2**40, 2**40]}, 16),
    "a shape beyond all digits": ({"shape": HUGE, "data_offsets": [8, 8]}, 16),
    "an unknown type": ({"dtype": "F31"}, 16),
    "a type that is a list": ({"dtype": ["F32"]}, 16),
}


@pytest.mark.parametrize("case", WRONG_ENTRIES)
def test_a_header_entry_that_cannot_be_true_is_refused_by_name(tmp_path, case):
    changes, data_bytes = WRONG_ENTRIES[case]
    path = raw_file(tmp_path / "x.safetensors", pair(**changes), bytes(data_bytes))
    message = refusal(lambda: SafetensorsFile(path))
    assert str(path) in message and ("'second'" in message or "'first'" in message)


@pytest.mark.parametrize("value", [None, 3, "text", [], [1, 2], {}, {"dtype": "F32"}])
def test_a_header_entry_that_is_no_description_of_a_tensor_is_refused_by_name(tmp_path, value):
    path = raw_file(tmp_path / "x.safetensors", {"first": entry(0, 8), "second": value}, bytes(8))
    message = refusal(lambda: SafetensorsFile(path))
    assert str(path) in message and "'second'" in message


def test_data_that_no_tensor_explains_is_refused(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", pair(), bytes(17))
    assert f"{path}: 1 unexplained" in refusal(lambda: SafetensorsFile(path))


def test_data_that_ends_before_the_last_tensor_is_refused(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", pair(), bytes(15))
    assert "truncated" in refusal(lambda: SafetensorsFile(path))


@pytest.mark.parametrize("raw", [b"", b"{", b"nonsense", b"[]", b"3", b'"text"', b"null", b'{"\xff": 1}', b"\0" * 64])
def test_a_header_that_is_no_json_object_is_refused(tmp_path, raw):
    path = raw_file(tmp_path / "x.safetensors", raw)
    assert str(path) in refusal(lambda: SafetensorsFile(path))


@pytest.mark.parametrize("length", [17, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    path = raw_file(tmp_path / "x.safetensors", b"{}", bytes(14), length=length)
    message = refusal(lambda: SafetensorsFile(path))
    assert str(path) in message and str(length) in message


def test_a_header_over_the_limit_of_the_format_is_refused_without_being_read(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", b"{}", length=MAX_HEADER_BYTES + 1)
    os.truncate(path, MAX_HEADER_BYTES + 100)  # a hole: it takes no space on disk
    message = refusal(lambda: SafetensorsFile(path))
    assert str(path) in message and str(MAX_HEADER_BYTES) in message


def header_with_a_name_twice(path: Path) -> Path:
    description = json.dumps(entry(0, 8))
    return raw_file(path, f'{{"first": {description}, "first": {description}}}'.encode(), bytes(8))


def test_a_name_that_occurs_twice_in_a_header_is_refused(tmp_path):
    path = header_with_a_name_twice(tmp_path / "x.safetensors")
    message = refusal(lambda: SafetensorsFile(path))
    assert str(path) in message and "twice" in message


def test_the_refusal_of_a_name_that_occurs_twice_says_which(tmp_path):
    path = header_with_a_name_twice(tmp_path / "x.safetensors")
    assert "'first'" in refusal(lambda: SafetensorsFile(path))


@pytest.mark.parametrize("depth", [100_000, *range(700, 1000, 100)])
def test_a_deeply_nested_header_is_refused(tmp_path, depth):
    path = raw_file(tmp_path / "x.safetensors", b'{"first": ' + b"[" * depth + b"]" * depth + b"}")
    assert str(path) in refusal(lambda: SafetensorsFile(path))


def test_a_header_nested_just_as_deep_as_can_be_parsed_is_refused(tmp_path):
    for depth in range(700, 1000):  # where exactly that is depends on the caller's own stack
        path = raw_file(tmp_path / "x.safetensors", b'{"first": ' + b"[" * depth + b"]" * depth + b"}")
        refusal(lambda path=path: SafetensorsFile(path))


# ---- config.json


@pytest.mark.parametrize("model_type", ["mamba2", "Jamba", "", None, 3, ["jamba"], {"jamba": 1}])
def test_an_unsupported_model_type_is_refused_with_the_list_of_supported_ones(folder, model_type):
    change_json(folder / "config.json", model_type=model_type)
    refused(folder, folder / "config.json", "model_type", "supported: jamba")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, folder / "config.json")


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"hello", b"[]", b"3", b"null", b"\xff\xfe", b'{"model_type": "jamba"', b"[" * 100_000,
     b'{"model_type": "jamba", "hidden_size": 1' + b"0" * 5000 + b"}"],
)  # fmt: skip
def test_a_config_that_is_no_json_object_is_refused(folder, raw):
    (folder / "config.json").write_bytes(raw)
    refused(folder, folder / "config.json")


def written_twice(path: Path, key: str, value: str) -> None:
    """The key once more, before the one that is there, which most readers would take."""
    path.write_text(path.read_text().replace(f'"{key}":', f'"{key}": {value}, "{key}":', 1))


@pytest.mark.parametrize(
    ("key", "value"), [("num_experts_per_tok", "1"), ("model_type", '"jamba"'), ("dtype", '"float16"')]
)
def test_a_key_that_config_holds_twice_is_refused_by_name(folder, key, value):
    written_twice(folder / "config.json", key, value)
    refused(folder, folder / "config.json", f"'{key}' occurs twice")


def test_a_tensor_that_the_index_lists_twice_is_refused(tmp_path):
    folder = make_jamba(tmp_path / "sharded", shards="100KB")
    written_twice(folder / INDEX, HEAD, '"model-00001.safetensors"')
    refused(folder, folder / INDEX, f"'{HEAD}' occurs twice")


@pytest.mark.parametrize("depth", [100_000, 990, 900, 500])
def test_a_deeply_nested_config_value_is_refused(folder, depth):
    path = folder / "config.json"
    path.write_text('{"model_type": "jamba", "hidden_size": ' + "[" * depth + "]" * depth + "}")
    refused(folder, path)


COUNTS = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts",
          "expert_layer_period", "mamba_d_state", "mamba_dt_rank"]  # fmt: skip


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", ["40", "many", 40.0, 2.5, True, [40], {"size": 40}, 0, -40, 1 << 62, float("nan")])
def test_a_count_that_is_no_positive_whole_number_is_refused_by_key(folder, key, value):
    change_json(folder / "config.json", **{key: value})
    message = refusal(lambda: open_config(folder))
    assert f"{folder / 'config.json'}: {key}" in message


@pytest.mark.parametrize("key, value", [
    ("hidden_size", None),
    ("expert_layer_offset", -1),
    ("attn_layer_offset", "2"),
    ("mamba_d_conv", 1),
    ("mamba_dt_rank", "automatic"),
    ("head_dim", 0),
    ("num_experts_per_tok", 0),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", -1e-6),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", float("inf")),
    ("tie_word_embeddings", "false"),
    ("tie_word_embeddings", 0),
    ("mamba_conv_bias", 1),
    ("mamba_proj_bias", [False]),
    ("hidden_act", "gelu"),
    ("hidden_act", ["silu"]),
    ("eos_token_id", "2"),
    ("eos_token_id", [2, "3"]),
])  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_by_key(folder, key, value):
    change_json(folder / "config.json", **{key: value})
    refused(folder, folder / "config.json", key)


@pytest.mark.parametrize("changes, keys", [
    ({"num_attention_heads": 7}, ["hidden_size 40", "num_attention_heads 7"]),
    ({"num_key_value_heads": 3}, ["num_attention_heads 5", "num_key_value_heads 3"]),
    ({"num_key_value_heads": 10}, ["num_attention_heads 5", "num_key_value_heads 10"]),
    ({"expert_layer_offset": 3}, ["expert_layer_offset 3", "expert_layer_period 3"]),
    ({"attn_layer_offset": 9}, ["attn_layer_offset 9", "attn_layer_period 4"]),
    ({"num_experts_per_tok": 4}, ["num_experts_per_tok 4", "num_experts 3"]),
])  # fmt: skip
def test_values_that_contradict_each_other_are_refused_with_both(folder, changes, keys):
    change_json(folder / "config.json", **changes)
    refused(folder, folder / "config.json", *keys)


def test_a_billion_layers_are_refused_from_the_config_alone(folder):
    change_json(folder / "config.json", num_hidden_layers=10**9)
    refused(folder, "num_hidden_layers", 10**9)
    (folder / SINGLE).unlink()
    assert "num_hidden_layers" in refusal(lambda: inspection.inspect(str(folder)))


def test_more_layers_than_there_are_tensors_are_refused_before_they_are_enumerated(folder, monkeypatch):
    change_json(folder / "config.json", num_hidden_layers=5000)
    limit_tensors(monkeypatch, 0)
    refused(folder, folder / "config.json", "num_hidden_layers", 5000, len(load_file(folder / SINGLE)))


def test_layers_times_experts_are_not_enumerated_without_bound(tmp_path, monkeypatch):
    """A config of a few bytes must not fill the memory, whether it is refused or worked out."""
    (tmp_path / "config.json").write_text('{"model_type": "jamba", "num_hidden_layers": 10000, "num_experts": 10000}')
    limit_tensors(monkeypatch, 200_000)
    with contextlib.suppress(InputError):
        inspection.inspect(str(tmp_path))


def limit_tensors(monkeypatch, most: int) -> None:
    """Fails the test when more than `most` tensors of layers are enumerated."""
    calls, real = itertools.count(1), Layer.specs

    def specs(layer):
        for spec in real(layer):
            assert next(calls) <= most, f"more than {most} tensors were enumerated"
            yield spec

    monkeypatch.setattr(Layer, "specs", specs)


# ---- random damage


BYTES = b'0123456789-.eE"{}[],: aF\x00\xff' + bytes(range(8))


def damage(raw: bytes, source: random.Random) -> bytes:
    """One place replaced, removed, inserted, doubled, or everything behind it cut off."""
    at, byte, length = source.randrange(len(raw)), bytes([source.choice(BYTES)]), source.randint(1, 40)
    return source.choice([
        raw[:at] + byte + raw[at + 1 :],
        raw[:at] + raw[at + 1 :],
        raw[:at] + byte + raw[at:],
        raw[:at] + raw[at : at + length] + raw[at:],
        raw[: at + 1],
    ])  # fmt: skip


def damaged_versions(raw: bytes, seed: int, count: int):
    """Each with one to three damages, always the same for a seed."""
    source = random.Random(seed)
    for _ in range(count):
        damaged = raw
        for _ in range(source.randint(1, 3)):
            damaged = damage(damaged, source) or raw
        yield damaged


def test_random_damage_to_a_safetensors_file_is_refused_or_harmless(tmp_path):
    """Opening and reading end in tensors or in InputError, in no other exception."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, path, {"format": "pt"})
    refusals = 0
    for number, damaged in enumerate(damaged_versions(path.read_bytes(), seed=1, count=600)):
        path.write_bytes(damaged)
        try:
            file = SafetensorsFile(path)
            for name in file.entries:
                file.read(name)
        except InputError:
            refusals += 1
        except Exception as error:
            pytest.fail(f"damage {number}, {damaged!r}: {error!r}")
    assert refusals > 300  # the damage is real: only a minority hits names, values or blanks


def test_random_damage_to_config_and_index_is_refused_or_harmless(tmp_path):
    """Opening ends in a model or in InputError, in no other exception."""
    folder = make_jamba(tmp_path, shards="200KB")
    refusals = 0
    for name, seed in (("config.json", 2), (INDEX, 3)):
        sound = (folder / name).read_bytes()
        for number, damaged in enumerate(damaged_versions(sound, seed, count=200)):
            (folder / name).write_bytes(damaged)
            try:
                open_config(folder)
                WeightFolder(folder)
            except InputError:
                refusals += 1
            except Exception as error:
                pytest.fail(f"{name}, damage {number}: {error!r}")
        (folder / name).write_bytes(sound)
    assert refusals > 200
