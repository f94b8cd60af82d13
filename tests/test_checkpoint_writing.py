"""Writing checkpoint shards: the `safetensors` library reads back what was meant, whatever the block size, and nothing
half-written ever bears a final name."""

import json
import struct
from pathlib import Path

import pytest
import torch
from jamba_models import make_jamba
from safetensors import safe_open
from safetensors.torch import load_file

from compress import formats
from compress.checkpoint import writer
from compress.checkpoint.folder import INDEX
from compress.checkpoint.reader import Checkpoint
from compress.disk import json_files
from compress.errors import WorkError
from compress.formats.base import Quantized
from compress.model import weight as model_module
from compress.model.roles import Role
from compress.model.weight import Unit, Weight
from compress.passes import PassContext
from compress.passes.quantize import Options, Quantize


def plain_units(folder: Path) -> tuple[Unit, ...]:
    return Checkpoint(folder).model.units


def int8_units(folder: Path) -> tuple[Unit, ...]:
    context = PassContext(device="cpu", seed=0)
    return tuple(Quantize(Options()).apply(unit, context) for unit in plain_units(folder))


UNITS = {"as it came": plain_units, "int8": int8_units}


def write_all(units: tuple[Unit, ...], folder: Path) -> Path:
    """All shards and the index."""
    folder.mkdir()
    for number, unit in enumerate(units):
        writer.write_shard(unit, folder / writer.shard_name(number, len(units)))
    writer.write_index(folder, units)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def matrix(values: torch.Tensor, format_name: str | None = None) -> Unit:
    """A unit of one matrix, plain float32 or quantized row by row on load."""

    def load(rows=None):
        block = values if rows is None else values[rows]
        return formats.get(format_name).quantize(block) if format_name else block

    weight = Weight("m.weight", Role.MLP, tuple(values.shape), format_name or "fp32", load)
    return Unit("unit", {weight.name: weight})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unchanged_units_read_back_equal_to_the_source(tmp_path, dtype):
    source = make_jamba(tmp_path / "source", dtype=dtype)
    expected = load_file(source / "model.safetensors")
    written = {}
    for path in write_all(plain_units(source), tmp_path / "out").glob("*.safetensors"):
        written |= load_file(path)
    assert written.keys() == expected.keys()
    assert all(written[name].dtype == dtype for name in written)
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_quantized_units_read_back_with_the_types_and_shapes_their_layout_promised(small, tmp_path):
    units = int8_units(small)
    folder = write_all(units, tmp_path / "out")
    for number, unit in enumerate(units):
        promised = {name: part[:2] for weight in unit.weights.values() for name, part in weight.layout().items()}
        written = load_file(folder / writer.shard_name(number, len(units)))
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in written.items()} == promised
        assert sum(tensor.nbytes for tensor in written.values()) == unit.stored_bytes()


@pytest.mark.parametrize("kind", UNITS)
def test_every_tensor_begins_at_a_multiple_of_its_element_size(small, tmp_path, kind):
    for path in write_all(UNITS[kind](small), tmp_path / "out").glob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, tensor in load_file(path).items():
            begin = json.loads(raw[8 : 8 + length])[name]["data_offsets"][0]
            assert (8 + length + begin) % tensor.element_size() == 0, name


def test_shards_say_that_they_hold_torch_tensors(small, tmp_path):
    for path in write_all(plain_units(small), tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers 4 refuses a file without it


@pytest.mark.parametrize("kind", UNITS)
def test_the_index_lists_every_tensor_where_it_is_and_their_total_size(small, tmp_path, kind):
    folder = write_all(UNITS[kind](small), tmp_path / "out")
    index = json.loads((folder / INDEX).read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())


@pytest.mark.parametrize("kind", UNITS)
def test_writing_twice_gives_the_same_bytes(small, tmp_path, kind):
    first, second = (contents(write_all(UNITS[kind](small), tmp_path / name)) for name in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize("block_bytes", [1, 1000, 5000])
def test_the_size_of_the_row_blocks_does_not_change_a_byte(small, tmp_path, monkeypatch, kind, block_bytes):
    whole = contents(write_all(UNITS[kind](small), tmp_path / "whole"))
    monkeypatch.setattr(model_module, "BLOCK_BYTES", block_bytes)
    assert contents(write_all(UNITS[kind](small), tmp_path / "blocks")) == whole


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
def test_a_matrix_of_few_rows_is_written_whole_when_each_row_is_a_block(tmp_path, monkeypatch, rows):
    """Two rows are as many as the stored shape has elements: the two must not be taken for each other."""
    unit = matrix(torch.randn(rows, 9, generator=torch.Generator().manual_seed(0)), "int8")
    writer.write_shard(unit, tmp_path / "whole.safetensors")
    monkeypatch.setattr(model_module, "BLOCK_BYTES", 1)
    writer.write_shard(unit, tmp_path / "rows.safetensors")
    expected = load_file(tmp_path / "whole.safetensors")
    written = load_file(tmp_path / "rows.safetensors")
    assert written["m.weight_shape"].tolist() == [rows, 9]
    for name in expected:
        assert torch.equal(written[name], expected[name]), name


def test_blocks_are_loaded_one_after_another_and_none_exceeds_the_block_size(small, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "BLOCK_BYTES", 1000)
    asked: list[slice] = []

    def watched(weight: Weight) -> Weight:
        def load(rows=None):
            asked.append(rows)
            return weight.load(rows)

        return weight.with_load(weight.format, load)

    embedding = plain_units(small)[0]
    writer.write_shard(embedding.map(watched), tmp_path / "x.safetensors")
    rows, columns = next(iter(embedding.weights.values())).shape
    assert [row for block in asked for row in range(block.start, block.stop)] == list(range(rows))
    assert max(4 * columns * (block.stop - block.start) for block in asked) <= 1000


def test_progress_adds_up_to_the_parameters_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "BLOCK_BYTES", 1000)
    for number, unit in enumerate(int8_units(small)):
        steps: list[int] = []
        writer.write_shard(unit, tmp_path / f"{number}.safetensors", steps.append)
        assert sum(steps) == sum(weight.parameters for weight in unit.weights.values())


# ---- nothing half-written


def failing_in_the_second_block(values: torch.Tensor) -> Unit:
    def load(rows=None):
        if rows.start > 0:
            raise RuntimeError("power cut")
        return values[rows]

    return matrix(values).map(lambda weight: weight.with_load("fp32", load))


def test_a_failure_half_way_leaves_no_file_under_the_final_name(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "BLOCK_BYTES", 1)
    path = tmp_path / "model-00001-of-00001.safetensors"
    with pytest.raises(RuntimeError, match="power cut"):
        writer.write_shard(failing_in_the_second_block(torch.ones(4, 3)), path)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_failure_half_way_leaves_an_earlier_file_as_it_was_and_a_second_try_succeeds(tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "BLOCK_BYTES", 1)
    path = tmp_path / "x.safetensors"
    writer.write_shard(matrix(torch.zeros(4, 3)), path)
    earlier = path.read_bytes()
    with pytest.raises(RuntimeError, match="power cut"):
        writer.write_shard(failing_in_the_second_block(torch.ones(4, 3)), path)
    assert path.read_bytes() == earlier
    writer.write_shard(matrix(torch.ones(4, 3)), path)
    assert torch.equal(load_file(path)["m.weight"], torch.ones(4, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_json_that_cannot_be_written_leaves_an_earlier_file_as_it_was(tmp_path):
    path = tmp_path / "config.json"
    json_files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        json_files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def quantized_with(scale: float) -> Quantized:
    return Quantized(torch.ones(2, 3, dtype=torch.int8), torch.tensor([[1.0], [scale]]), "int8")


@pytest.mark.parametrize("stored, said", [
    (torch.tensor([[1.0, float("nan")]]), "not finite"),
    (torch.tensor([[1.0, float("inf")]]), "not finite"),
    (quantized_with(float("nan")), "not finite"),
    (quantized_with(float("inf")), "not finite"),
    (quantized_with(0.0), "not positive"),
    (quantized_with(-1.0), "not positive"),
])  # fmt: skip
def test_a_pass_that_produced_nonsense_fails_by_name_and_writes_no_file(tmp_path, stored, said):
    is_plain = isinstance(stored, torch.Tensor)
    shape = tuple((stored if is_plain else stored.values).shape)
    weight = Weight("m.weight", Role.MLP, shape, "fp32" if is_plain else "int8", lambda rows=None: stored)
    with pytest.raises(WorkError, match=rf"m\.weight.*{said}"):
        writer.write_shard(Unit("unit", {weight.name: weight}), tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


# ---- what goes along


def test_tokenizer_and_papers_go_along_but_neither_code_nor_other_weights(tmp_path):
    wanted = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "merges.txt",
              "vocab.json", "chat_template.jinja", "generation_config.json", "LICENSE", "NOTICE.txt"]  # fmt: skip
    unwanted = ["model.safetensors", "pytorch_model.bin", "modeling_jamba.py", "tokenization_jamba.py", "config.json",
                "training_args.bin", "notes.txt"]  # fmt: skip
    for name in wanted + unwanted:
        (tmp_path / name).touch()
    (tmp_path / "tokenizer").mkdir()
    assert {path.name for path in writer.companion_files(tmp_path)} == set(wanted)
