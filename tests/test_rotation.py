"""Hadamard rotation: the function stays what it was, what is rounded has no outliers, and a reader is told of it."""

import json

import pytest
import torch
from compressed_tensors.transform import TransformConfig
from jamba_models import make_jamba
from refusals import refusal

from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.formats import hadamard
from compress.formats.activations import Activation
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

OUT_PROJ = "model.layers.0.mamba.out_proj.weight"
RECIPE = """version: 1
calibration: {prompts: [self], samples: 4, length: 32}
passes:
  - quantize:
      weights: int8
      activation_roles: {ssm_out: ACTIVATION}
      rotate: [ssm_out]
"""


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return make_jamba(tmp_path_factory.mktemp("model"), spread=0.7)


@pytest.fixture(scope="module", params=["static-int8", "dynamic-fp8"])
def rotated(request, small_model, tmp_path_factory):
    """A checkpoint whose out_proj is stored rotated."""
    folder = tmp_path_factory.mktemp("rotated")
    (folder / "recipe.yaml").write_text(RECIPE.replace("ACTIVATION", request.param))
    pipeline.apply(pipeline.Job(load_recipe(str(folder / "recipe.yaml")), resolve(str(small_model)), folder / "out"))
    return folder / "out" / "checkpoint"


@pytest.mark.parametrize(("width", "size"), [(320, 64), (80, 16), (7, 1), (8192, 8192), (10, 2)])
def test_blocks_are_the_largest_power_of_two_that_divides_the_width(width, size):
    assert hadamard.block_size(width) == size


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_matrix_is_orthogonal_and_its_own_inverse(size):
    r = hadamard.matrix(size).double()
    assert torch.allclose(r @ r, torch.eye(size, dtype=torch.float64), atol=1e-6)  # 1 / sqrt(n) in float32
    assert torch.equal(r, r.T) and torch.allclose(r.abs(), torch.full_like(r, size**-0.5), atol=1e-7)


def test_a_rotation_of_two_by_hand():
    turned = hadamard.rotate(torch.tensor([[3.0, 1.0, 0.0, 2.0]]), 2)
    assert torch.allclose(turned * 2**0.5, torch.tensor([[4.0, 2.0, 2.0, -2.0]]), atol=1e-6)


def test_an_outlier_is_spread_so_that_the_rest_survives_rounding():
    x = torch.ones(1, 64)
    x[0, 5] = 640.0
    plain = Activation("dynamic-int8").fake_quantize(x)
    turned = hadamard.rotate(Activation("dynamic-int8").fake_quantize(hadamard.rotate(x, 64)), 64)
    others = torch.arange(64) != 5
    assert (plain[0, others] == 0).all()  # 640 / 127 is the step: everything else is lost
    assert (turned[0, others] - 1).abs().mean() < 0.3


def test_weights_are_those_of_the_original_in_the_models_own_basis(rotated, small_model):
    original = {w.name: w.dense() for w in Checkpoint(small_model).model.weights}
    weight = next(w for w in Checkpoint(rotated, allow_quantized=True).model.weights if w.name == OUT_PROJ)
    assert weight.rotation == 16
    # an int8 value is off by half a step at most, and a rotation keeps the length of a row's error
    row_error = (weight.dense() - original[OUT_PROJ]).square().sum(1).sqrt()
    steps = weight.load(None).scales[:, 0]
    assert (row_error <= 0.5 * steps * weight.shape[1] ** 0.5).all()
    blocks = torch.cat([weight.dense(slice(0, 7)), weight.dense(slice(7, 40))])
    assert torch.allclose(blocks, weight.dense(), atol=1e-6)


def test_other_matrices_are_not_rotated(rotated):
    turned = {w.name for w in Checkpoint(rotated, allow_quantized=True).model.weights if w.rotation}
    assert turned == {f"model.layers.{i}.mamba.out_proj.weight" for i in (0, 1, 3, 4, 5)}


def test_the_checkpoint_describes_the_rotation_as_compressed_tensors_does(rotated):
    section = json.loads((rotated / "config.json").read_text())["quantization_config"]["transform_config"]
    scheme = TransformConfig.model_validate(section).config_groups["rotation_16"]
    assert (scheme.type, scheme.head_dim) == ("hadamard", 16)
    assert [(a.location, a.inverse) for a in scheme.apply] == [("input", False), ("weight_input", True)]


@pytest.mark.parametrize("damage", [{"type": "random-matrix"}, {"head_dim": 12}, {"head_dim": None}, {"apply": []}])
def test_a_transform_that_is_not_known_is_refused(rotated, tmp_path, damage):
    copy = _with_transform(rotated, tmp_path, **damage)
    message = refusal(lambda: Checkpoint(copy, allow_quantized=True))
    assert "config.json" in message and "transform" in message


def test_a_rotation_that_does_not_divide_the_input_is_refused(rotated, tmp_path):
    message = refusal(lambda: Checkpoint(_with_transform(rotated, tmp_path, head_dim=64), allow_quantized=True))
    assert "64" in message and "out_proj" in message


def _with_transform(source, folder, **changes):
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["transform_config"]["config_groups"]["rotation_16"] |= changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_rotation_of_what_is_not_rounded_is_refused(small_model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("ACTIVATION", "none"))
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(small_model)), tmp_path / "out")
    message = refusal(lambda: pipeline.apply(job))
    assert "rotate" in message and "ssm_out" in message
