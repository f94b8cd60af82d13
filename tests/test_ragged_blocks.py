"""fp8 in blocks of 128x128 on matrices that end in the middle of a block both ways: checkpoint and ONNX file, tensor by
tensor, against numpy and the compressed-tensors library."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from jamba_models import make_jamba
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.model import weight as model
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.inference import Head, stream
from compress.runtime.onnx_session import OnnxSession

BLOCK, MOST = 128, 448
SHAPES = {  # [200, 150] and [150, 200] in the feed-forwards, [333, 150] in the embedding, [300, 10] in dt_proj
    "hidden_size": 150, "intermediate_size": 200, "vocab_size": 333, "num_hidden_layers": 3, "expert_layer_period": 2,
}  # fmt: skip


def blocks(shape) -> list[tuple[slice, slice]]:
    return [
        (slice(r, r + BLOCK), slice(c, c + BLOCK)) for r in range(0, shape[0], BLOCK) for c in range(0, shape[1], BLOCK)
    ]


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """Every block four times as large as the one before it, so that a scale of another block is far off."""
    spread = tensor.clone()
    for number, block in enumerate(blocks(tensor.shape)):
        spread[block] *= 4.0 ** (number - 1)
    return spread


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Every block by its largest magnitude to fp8 and back. (That torch's cast is E4M3 to the bit is tested elsewhere.)"""
    result = torch.empty(tensor.shape)
    for block in blocks(tensor.shape):
        scale = tensor[block].float().abs().max() / MOST
        scale = torch.where(scale > 0, scale, 1.0)
        result[block] = (tensor[block].float() / scale).to(torch.float8_e4m3fn).float() * scale
    return result


class Applied:
    """Source, checkpoint and ONNX file; matrices were read and written in blocks of 128 rows."""

    def __init__(self, folder: Path):
        source = make_jamba(folder / "source", spread=0.7, **SHAPES)
        tensors = load_file(source / "model.safetensors")
        self.matrices = [n for n, t in tensors.items() if t.dim() == 2 and not n.endswith(("A_log", "router.weight"))]
        self.source = tensors | {name: apart(tensors[name]) for name in self.matrices}
        save_file(self.source, source / "model.safetensors", metadata={"format": "pt"})
        loaded = load_recipe("tiny-int8", ("check=null", "passes.0.quantize.weights=fp8-e4m3-b128"))
        pipeline.apply(pipeline.Job(loaded, resolve(str(source)), folder / "out"))
        self.folder, self.onnx, self.scratch = folder / "out" / "checkpoint", folder / "out" / "onnx", folder


@pytest.fixture(scope="module")
def applied(tmp_path_factory) -> Applied:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "BLOCK_BYTES", 1)
        yield Applied(tmp_path_factory.mktemp("ragged"))


def test_the_checkpoint_holds_what_its_library_reads_as_the_rounded_matrices(applied):
    section = json.loads((applied.folder / "config.json").read_text())["quantization_config"]
    (group,) = section["config_groups"].values()
    arguments = QuantizationArgs.model_validate(group["weights"])
    stored = {name: t for path in applied.folder.glob("*.safetensors") for name, t in load_file(path).items()}
    assert {tuple(stored[f"{name}_scale"].shape) for name in applied.matrices} >= {(2, 2), (3, 2), (5, 2), (3, 1)}
    for name in applied.matrices:
        scales = stored[f"{name}_scale"]
        back = dequantize(stored[name], scales, torch.zeros_like(scales), arguments)
        assert torch.equal(back, rounded(applied.source[name])), name


def test_our_reader_gives_the_same_whole_and_in_blocks_of_rows(applied):
    weights = {w.name: w for w in Checkpoint(applied.folder, allow_quantized=True).model.weights}
    for name in applied.matrices:
        expected, weight = rounded(applied.source[name]), weights[name]
        assert torch.equal(weight.dense(), expected), name
        pieces = [weight.dense(rows) for rows in weight.row_blocks()]
        assert len(pieces) == -(-len(expected) // BLOCK) and torch.equal(torch.cat(pieces), expected), name


def test_the_onnx_file_holds_the_same(applied):
    graph = onnx.load(applied.onnx / "model.onnx").graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for name in applied.matrices:
        values, scales = (numpy_helper.to_array(tensors[n]) for n in (name, f"{name}_scale"))
        if values.dtype == np.uint8:  # the embedding, as its rows are looked up
            values, scales = torch.tensor(values).view(torch.float8_e4m3fn).float().numpy().T, scales.T
        values = values.astype(np.float32)
        spread = scales.repeat(BLOCK, 0).repeat(BLOCK, 1)[: values.shape[0], : values.shape[1]]
        assert np.array_equal((values * spread).T, rounded(applied.source[name]).numpy()), name


def test_onnxruntime_computes_with_them(applied):
    ours = Checkpoint(applied.folder, allow_quantized=True).model
    ids = np.random.default_rng(0).integers(3, 333, (2, 9))
    expected = np.concatenate(
        [Head(ours, "cpu")(h).numpy() for _, h in stream(ours, list(torch.from_numpy(ids)), applied.scratch)]
    )
    actual = OnnxSession(applied.onnx / "model.onnx").start(2).step(ids)
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()
