"""Quantized checkpoints: what `apply` writes is what numpy computes from the source, for our reader, for the
compressed-tensors library and for stock transformers alike."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from jamba_models import fused, make_jamba
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from compress import formats
from compress.apply import pipeline
from compress.checkpoint import compressed_tensors, writer
from compress.checkpoint.folder import INDEX, SINGLE
from compress.checkpoint.reader import Checkpoint
from compress.errors import InputError
from compress.formats.base import Quantized
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEPT_MATRICES = ("A_log", "router.weight")  # 2-D tensors that stay as they came

# name -> changes to the awkward model, and overrides of the recipe
CASES = {
    "awkward": ({}, ()),
    "tied": ({"tie_word_embeddings": True}, ()),
    # no matrix has a multiple of four columns, so that every row is padded; projections have biases
    "odd sides": (
        {"hidden_size": 35, "intermediate_size": 57, "mamba_dt_rank": 3, "mamba_expand": 1, "mamba_proj_bias": True},
        (),
    ),
    "float32, some roles kept": (
        {"dtype": torch.float32},
        ("passes.0.quantize.roles={embedding: none, lm_head: none, ssm_dt_proj: none, attention_qkv: none}",),
    ),
}
KEPT_ROLES = {"float32, some roles kept": ("embed_tokens.weight", "lm_head.weight", "dt_proj.weight", "q_proj.weight",
                                           "k_proj.weight", "v_proj.weight")}  # fmt: skip


class Artifact:
    """A source folder, the checkpoint `apply` made of it, and what numpy says its weights are."""

    def __init__(self, source: Path, folder: Path, kept: tuple[str, ...] = ()):
        self.source, self.folder, self.kept = source, folder, kept
        self.config = json.loads((folder / "config.json").read_text())
        self.section = self.config["quantization_config"]
        self.original = load_file(source / SINGLE)
        self.stored = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
        self.expected = {
            name: torch.from_numpy(reference(tensor) if self.is_quantized(name, tensor) else tensor.float().numpy())
            for name, tensor in self.original.items()
        }

    def is_quantized(self, name: str, tensor: torch.Tensor) -> bool:
        return tensor.dim() == 2 and not name.endswith((*KEPT_MATRICES, *self.kept))

    @property
    def quantized(self) -> list[str]:
        return [name for name, tensor in self.original.items() if self.is_quantized(name, tensor)]


def reference(weight: torch.Tensor) -> np.ndarray:
    """int8 with one scale per row and back, in numpy float32: absmax / 127, round half to even, clip."""
    array = weight.float().numpy()
    scales = np.abs(array).max(axis=1, keepdims=True) / np.float32(127)
    scales[scales == 0] = 1  # a row of zeros, such as that of the padding token
    return np.clip(np.rint(array / scales), -127, 127).astype(np.float32) * scales


def apply_int8(model: Path, out: Path, *overrides: str) -> Path:
    """The checkpoint the quick-start recipe writes, without export and check."""
    recipe = load_recipe("tiny-int8", ("check=null", "export=[]", *overrides))
    pipeline.apply(pipeline.Job(recipe, resolve(str(model)), out))
    return out / "checkpoint"


@pytest.fixture(scope="module", params=CASES)
def artifact(request, tmp_path_factory) -> Artifact:
    changes, overrides = CASES[request.param]
    folder = tmp_path_factory.mktemp("artifact")
    source = make_jamba(folder / "source", **changes)
    return Artifact(source, apply_int8(source, folder / "out", *overrides), KEPT_ROLES.get(request.param, ()))


@pytest.fixture(scope="module")
def awkward(small, tmp_path_factory) -> Artifact:
    return Artifact(small, apply_int8(small, tmp_path_factory.mktemp("awkward") / "out"))


def our_weights(folder: Path) -> dict:
    return {weight.name: weight for weight in Checkpoint(folder, allow_quantized=True).model.weights}


# ---- our reader


def test_our_reader_gives_numpys_weights_bit_for_bit(artifact):
    found = our_weights(artifact.folder)
    assert found.keys() == artifact.expected.keys()
    for name, weight in found.items():
        assert torch.equal(weight.dense(), artifact.expected[name]), name
    assert {name for name, weight in found.items() if weight.format == "int8"} == set(artifact.quantized)


def test_our_reader_gives_blocks_of_rows_of_quantized_weights(artifact):
    for name, weight in our_weights(artifact.folder).items():
        rows = slice(weight.shape[0] // 3, weight.shape[0] // 3 + 2)
        assert torch.equal(weight.dense(rows), artifact.expected[name][rows]), name


def test_the_reference_model_holds_numpys_weights_bit_for_bit(tiny, applied):
    artifact = Artifact(tiny, applied / "checkpoint")
    for name, weight in our_weights(artifact.folder).items():
        assert torch.equal(weight.dense(), artifact.expected[name]), name


def test_our_reader_reads_a_model_whose_experts_stayed_as_they_came(small, tmp_path):
    folder = apply_int8(small, tmp_path / "out", "passes.0.quantize.roles={experts: none}")
    experts = tuple(f"experts.{i}.{part}_proj.weight" for i in range(3) for part in ("gate", "up", "down"))
    expected = Artifact(small, folder, experts).expected
    for name, weight in our_weights(folder).items():
        assert weight.format == ("bf16" if "experts" in name else weight.format)
        assert torch.equal(weight.dense(), expected[name]), name


def test_what_is_not_quantized_keeps_its_bytes(artifact):
    for name in artifact.original.keys() - set(artifact.quantized):
        assert artifact.stored[name].dtype == artifact.original[name].dtype, name
        assert torch.equal(artifact.stored[name], artifact.original[name]), name


def test_a_quantized_matrix_is_stored_under_the_librarys_three_names(artifact):
    suffixes = ("weight_packed", "weight_scale", "weight_shape")
    expected = {name.removesuffix("weight") + suffix for name in artifact.quantized for suffix in suffixes}
    assert set(artifact.stored) == expected | (artifact.original.keys() - set(artifact.quantized))


def test_a_tied_model_stores_its_embedding_once_and_no_head(tmp_path):
    source = make_jamba(tmp_path / "source", tie_word_embeddings=True)
    folder = apply_int8(source, tmp_path / "out")
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    assert "model.embed_tokens.weight_packed" in names
    assert not any("lm_head" in name for name in names)


# ---- the compressed-tensors library


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 10, 35, 160])
def test_packed_words_are_those_of_the_library(columns):
    values = torch.randint(-127, 128, (6, columns), generator=torch.Generator().manual_seed(columns), dtype=torch.int8)
    packed = formats.get("int8").pack(Quantized(values, torch.ones(6, 1), "int8"), (6, columns))["weight_packed"]
    assert torch.equal(packed, pack_to_int32(values, num_bits=8))


def test_the_library_unpacks_the_stored_tensors_to_numpys_weights(artifact):
    for name in artifact.quantized:
        packed, scale, shape = (artifact.stored[name + suffix] for suffix in ("_packed", "_scale", "_shape"))
        values = unpack_from_int32(packed, 8, torch.Size(shape.tolist()))
        assert torch.equal(values.float() * scale, artifact.expected[name]), name


def test_the_library_accepts_the_section_and_reads_symmetric_int8_per_channel(artifact):
    parsed = QuantizationConfig.model_validate({k: v for k, v in artifact.section.items() if k != "dequantize"})
    (group,) = parsed.config_groups.values()
    arguments = group.weights
    assert (arguments.num_bits, arguments.type, arguments.symmetric, arguments.strategy) == (8, "int", True, "channel")
    assert group.input_activations is None and group.output_activations is None
    assert parsed.format == "pack-quantized" and parsed.quantization_status == "compressed"


def test_the_library_accepts_the_section_as_it_stands_in_the_file(artifact):
    QuantizationConfig.model_validate(artifact.section)


def test_the_ignore_list_names_exactly_the_matrices_that_are_not_quantized(artifact):
    matrices = {name for name, tensor in artifact.original.items() if tensor.dim() == 2}
    expected = {name.removesuffix(".weight") for name in matrices - set(artifact.quantized)}
    assert set(artifact.section["ignore"]) == expected


# ---- stock transformers


def transformers_parameters(folder: Path, **options) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("options", [{}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}],
                         ids=["plain", "asked to dequantize"])  # fmt: skip
def test_transformers_loads_numpys_weights_bit_for_bit(artifact, options):
    loaded = transformers_parameters(artifact.folder, **options)
    expected = fused(artifact.expected, artifact.config["num_experts"])
    expected.setdefault(HEAD, expected[EMBEDDING])  # tied
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name


# ---- sections and tensors that are not what they should be


def test_no_section_is_written_where_nothing_is_quantized(small):
    assert compressed_tensors.quantization_config(Checkpoint(small).model.weights) is None


@pytest.fixture
def damaged(awkward, tmp_path) -> Path:
    """A copy of the quantized awkward model, one file, that a test may damage."""
    save_file(awkward.stored, tmp_path / SINGLE)
    shutil.copy(awkward.folder / "config.json", tmp_path)
    return tmp_path


def refusal(folder: Path, name: str | None = None) -> str:
    """The one sentence that refuses to open the folder, or to read one weight of it."""
    with pytest.raises(InputError) as caught:
        weights = our_weights(folder)
        if name:
            weights[name].dense()
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_section(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    writer.write_config(folder, config)


def change_tensor(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / SINGLE)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / SINGLE)


def group(**weights) -> dict:
    scheme = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"} | weights
    return {"group_0": {"targets": ["Linear"], "weights": scheme}}


def test_the_merged_copy_the_next_tests_damage_is_sound(awkward, damaged):
    assert torch.equal(our_weights(damaged)[EMBEDDING].dense(), awkward.expected[EMBEDDING])


@pytest.mark.parametrize("changes", [
    {"quant_method": "gptq"},
    {"quant_method": None},
    {"config_groups": None},
    {"config_groups": {}},
    {"config_groups": []},
    {"config_groups": {"group_0": None}},
    {"config_groups": {"group_0": {"weights": None}}},
    {"config_groups": group() | {"group_1": {}}},
    {"config_groups": group(num_bits=3)},
    {"config_groups": group(type="float", num_bits=4)},
    {"config_groups": group(symmetric=False)},
    {"config_groups": group(strategy="tensor_group")},
    {"config_groups": group(strategy="group", group_size=24)},
])  # fmt: skip
def test_a_section_that_describes_what_is_not_known_here_is_refused(damaged, changes):
    change_section(damaged, **changes)
    message = refusal(damaged)
    assert str(damaged / "config.json") in message and "quantization_config" in message


@pytest.mark.parametrize("section", [None, 3, [], "compressed-tensors", {}])
def test_a_section_that_is_none_is_refused(damaged, section):
    config = json.loads((damaged / "config.json").read_text()) | {"quantization_config": section}
    writer.write_config(damaged, config)
    assert str(damaged / "config.json") in refusal(damaged)


@pytest.mark.parametrize("suffix, change", [
    ("_packed", lambda t: t[:, :-1].clone()),
    ("_packed", lambda t: t.to(torch.int64)),
    ("_scale", lambda t: t[:-1].clone()),
    ("_scale", lambda t: t.view(-1).clone()),
    ("_scale", lambda t: t.to(torch.bfloat16)),
    ("_shape", lambda t: t.to(torch.int32)),
])  # fmt: skip
def test_a_stored_part_of_the_wrong_shape_or_type_is_named(damaged, suffix, change):
    name = EMBEDDING + suffix
    change_tensor(damaged, name, change)
    message = refusal(damaged)
    assert str(damaged / SINGLE) in message and f"'{name}'" in message


@pytest.mark.parametrize("suffix", ["_scale", "_shape"])
def test_a_missing_part_of_a_quantized_matrix_is_named(damaged, suffix):
    tensors = load_file(damaged / SINGLE)
    del tensors[EMBEDDING + suffix]
    save_file(tensors, damaged / SINGLE)
    assert f"'{EMBEDDING}{suffix}'" in refusal(damaged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_named_when_read(damaged, value):
    change_tensor(damaged, EMBEDDING + "_scale", lambda scale: torch.full_like(scale, value))
    message = refusal(damaged, EMBEDDING)
    assert str(damaged / SINGLE) in message and f"'{EMBEDDING}_scale'" in message


@pytest.mark.parametrize(
    "name", ["model.final_layernorm.weight", "model.layers.0.mamba.conv1d.weight", "model.x.weight"]
)
def test_packed_values_of_what_is_no_matrix_of_the_model_are_refused_by_name(damaged, name):
    tensors = load_file(damaged / SINGLE) | {f"{name}_packed": torch.zeros(2, 2, dtype=torch.int32)}
    save_file(tensors, damaged / SINGLE)
    assert name in refusal(damaged)
