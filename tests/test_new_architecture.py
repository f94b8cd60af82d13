"""The worked example of docs/architecture.md, a family in one file: what its few lines give, against plain loops and through
the commands. It brings what no shipped family has: mixers side by side, rotary positions, biases, multipliers, a softmax
over the chosen experts alone, experts without gates."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from stepping import own_logits
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from compress.apply import exporting
from compress.checkpoint.reader import Checkpoint
from compress.model import families
from compress.recipe import resources
from compress.runtime import runtimes
from compress.runtime.onnx_session import OnnxSession

HIDDEN, HEADS, KV_HEADS, INNER, STATES, RANK = 48, 6, 2, 96, 5, 7
AGREEMENT = 2e-5  # float32 on logits of about 1, through three layers


@pytest.fixture(autouse=True)
def toy(tmp_path_factory, monkeypatch):
    """The family as the document prints it."""
    folder = tmp_path_factory.mktemp("families")
    text = (resources.folder("docs") / "architecture.md").read_text()
    source = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if code.startswith('"""`toy`'))
    (folder / "toy.py").write_text(source)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    assert len(source.splitlines()) <= 150


@pytest.fixture
def folder(tmp_path):
    """A random checkpoint of it, with the reference model's tokenizer left out."""
    values = {"model_type": "toy", "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2}
    architecture = families.get("toy").parse(values, "config.json")
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for unit in architecture.layout():
        for spec in unit.specs:
            tensor = torch.randn(spec.shape, generator=g) / (spec.shape[-1] ** 0.5 if len(spec.shape) > 1 else 4)
            tensors[spec.name] = tensor + 1 if "norm" in spec.name else tensor
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "config.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "toy" / "model.safetensors")
    return tmp_path / "toy"


def norm(x, weight):
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def mamba(w, x):
    """One sequence x [S, H], a token at a time."""
    x, gate = (x @ w["in_proj.weight"].T).chunk(2, -1)
    padded, kernel = torch.cat([torch.zeros(2, INNER), x]), w["conv1d.weight"][:, 0].T
    x = torch.stack([(padded[t : t + 3] * kernel).sum(0) for t in range(len(x))]) + w["conv1d.bias"]
    x, h, outputs = F.silu(x), torch.zeros(INNER, STATES), []
    parts = (x @ w["x_proj.weight"].T).split([RANK, STATES, STATES], -1)
    low, b, c = (norm(part, w[f"{name}_layernorm.weight"]) for name, part in zip(("dt", "b", "c"), parts, strict=True))
    dt = F.softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
    for t in range(len(x)):
        h = torch.exp(dt[t, :, None] * -w["A_log"].exp()) * h + (dt[t] * x[t])[:, None] * b[t]
        outputs.append(h @ c[t] + w["D"] * x[t])
    return (torch.stack(outputs) * F.silu(gate)) @ w["out_proj.weight"].T


def attention(w, x):
    width, places = HIDDEN // HEADS, torch.arange(len(x))
    q, k, v = (F.linear(x, w[f"{n}_proj.weight"], w[f"{n}_proj.bias"]).unflatten(-1, (-1, width)).transpose(0, 1)[None]
               for n in "qkv")  # fmt: skip
    angles = places[:, None] / 1e4 ** (torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1)[None]
    q, k = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(places[:, None] < places, -torch.inf)
    mixed = (scores.softmax(-1) @ v)[0].transpose(0, 1).flatten(1)
    return F.linear(mixed, w["o_proj.weight"], w["o_proj.bias"])


def moe(w, x, experts):
    logits, output = x @ w["router.weight"].T, torch.zeros_like(x)
    for t, row in enumerate(x):
        values, chosen = logits[t].topk(2)
        for gate, e in zip(values.softmax(0), chosen.tolist(), strict=True):
            up = w[f"experts.{e}.up_proj.weight"] @ row
            output[t] += gate * (w[f"experts.{e}.down_proj.weight"] @ up.relu().square())
    return output


def within(weights, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def expected_logits(tensors, ids):
    """One sequence, from the tensors of the file alone."""
    hidden = tensors["embed.weight"][ids]
    for index in range(3):
        w = within(tensors, f"layers.{index}.")
        x = norm(hidden, w["norm1.weight"])
        hidden = hidden + 0.5 * (mamba(within(w, "mamba."), x) + 0.7 * attention(within(w, "attn."), x))
        hidden = hidden + 0.5 * moe(w, norm(hidden, w["norm2.weight"]), 4)
    return norm(hidden, tensors["norm.weight"]) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize("cuts", [(13,), (6, 7, 8, 9, 10, 11, 12, 13), (5, 13)])
@pytest.mark.parametrize("padding", [0, 3])
def test_its_forward_is_that_of_plain_loops(folder, cuts, padding):
    ids = torch.randint(3, 128, (2, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 13)
    mask[0, :padding] = 0
    actual = own_logits(Checkpoint(folder).model, ids, cuts, mask if padding else None)
    tensors = load_file(folder / "model.safetensors")
    for row, first in enumerate((padding, 0)):
        expected = expected_logits(tensors, ids[row, first:])
        torch.testing.assert_close(actual[row, first:], expected, rtol=0, atol=AGREEMENT)


def test_its_graph_needs_no_file_and_gives_the_same(folder, tmp_path):
    """A prompt with padding before it, then token by token."""
    ids, mask = np.random.default_rng(1).integers(3, 128, (2, 13)), np.ones((2, 13), np.int64)
    mask[0, :3] = 0
    path = exporting.export_checkpoint(folder, "onnx", tmp_path / "onnx") / "model.onnx"
    generation, model = OnnxSession(path, threads=1).start(2), Checkpoint(folder).model
    pieces = zip(*(np.split(values, range(6, 13), axis=1) for values in (ids, mask)), strict=True)
    actual = np.concatenate([generation.step(*piece).copy() for piece in pieces], 1)
    expected = own_logits(model, torch.from_numpy(ids), [13], torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(actual[mask == 1], expected[mask == 1], rtol=0, atol=AGREEMENT)


def test_a_layer_with_both_kinds_of_states_is_told_beforehand_of_transformers_js(folder):
    rows = {row.name: row for row in runtimes.of_onnx(Checkpoint(folder).model, "onnx", "transformers.js")}
    assert not rows["transformers.js"].loads and "side by side" in rows["transformers.js"].why
    assert rows["onnxruntime"].loads and rows["openvino"].loads
