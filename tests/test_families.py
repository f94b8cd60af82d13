"""Families of models that others write: their layers as the commands see them, and files that are none."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from refusals import refusal, refusal_of_command
from safetensors.torch import load_file, save_file
from stepping import own_logits

from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.formats.remembered import Precision
from compress.model import families
from compress.model.block import Layer, Residual
from compress.model.blocks.attention import Attention
from compress.model.blocks.mamba2 import Mamba2
from compress.model.blocks.moe import Moe
from compress.model.blocks.parallel import Parallel
from compress.model.routing import Router
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.onnx_session import OnnxSession

EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
EXPERTS, KEPT = 5, 3
GPTQ = {"quantize": {"weights": "int8", "method": "gptq", "equalize": 0.5}}
FAMILY = '''
from typing import ClassVar
from compress.model.architecture import Architecture
from compress.model.block import Layer, Residual
from compress.model.blocks.attention import Attention
from compress.model.blocks.mamba2 import Mamba2
from compress.model.blocks.mlp import Mlp
from compress.model.blocks.moe import Moe
from compress.model.blocks.parallel import Parallel
from compress.model.config import Config, Positive, Size
from compress.model.roles import Role
from compress.model.routing import Router

class MineConfig(Config):
    vocab_size: Size = 67
    hidden_size: Size = 40
    num_hidden_layers: Size = 2
    num_experts: Size = 5
    num_experts_per_tok: Size = 2
    max_position_embeddings: Size = 512
    rms_norm_eps: Positive = 1e-6
    multiplier: Positive = 1.0
    layers: str = "after"

    @property
    def total_experts(self): return self.num_experts

class Mine(Architecture):
    CONFIG = MineConfig
    EMBEDDING: ClassVar[str] = "embed.weight"
    FINAL_NORM: ClassVar[str] = "norm.weight"
    EXPERTS_KEYS: ClassVar[tuple[str, ...]] = ("num_experts",)

    def layer(self, index):
        config, eps = self.config, 1e-6
        count = config.compress.of_layer(index, config.num_experts)
        mixer = Mamba2("mamba.", 40, 4, 10, 2, 5, 3, eps) if index else Attention("attention.", 40, 5, 1, 6)
        router = Router("router.weight", count, 2, renormalized=True)
        shared = Mlp("shared.", 40, 12, gated=True, role=Role.SHARED_EXPERTS)
        moe = Moe("experts.", 40, 16, count, router, gated=True, shared=shared)
        both = Residual("norm1.weight", mixer, eps), Residual("norm2.weight", moe, eps, config.multiplier)
        beside = (Residual("norm1.weight", Parallel(((mixer, 1.5), (moe, 0.5))), eps, config.multiplier),)
        residuals = {"after": both, "before": both[::-1], "beside": beside}[config.layers]
        return Layer(index, f"layers.{index}.", 40, residuals)
'''  # fmt: skip
BROKEN = {
    "a syntax error": ("class Mine(:\n", "SyntaxError"),
    "an import that fails": ("import nowhere_to_be_found\n", "nowhere_to_be_found"),
    "an end of the process": ("raise SystemExit(0)\n", "it ends the process"),
    "no class": ("x = 1\n", "expected one class that inherits from Architecture, found none"),
    "a misspelt name": (FAMILY.replace("FINAL_NORM", "FINAL_NORMS"), "did you mean 'FINAL_NORM'?"),
    "a name that is missing": (FAMILY.replace("    CONFIG = MineConfig\n", ""), "Mine lacks CONFIG"),
    "a misspelt hook": (FAMILY.replace("def layer(", "def layr("), "did you mean 'layer'?"),
    "no layers": (FAMILY.replace("def layer(", "def _layer("), "Mine lacks layer"),
    "other arguments": (
        FAMILY.replace("(self, index)", "(self)"),
        "Mine.layer takes (self), but is given (self, index)",
    ),
}


@pytest.fixture
def plug(tmp_path, monkeypatch):
    """Puts the text of the family `mine` beside the shipped ones; returns the file."""
    (tmp_path / "families").mkdir()
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])

    def plug(text: str):
        path = tmp_path / "families" / "mine.py"
        path.write_text(text)
        return path

    yield plug
    sys.modules.pop(f"{families.__name__}.mine", None)


@pytest.fixture
def make(plug, tmp_path):
    """A random float32 checkpoint of it. `factor`: what matrices that give the experts' output are multiplied with."""

    def make(name: str = "source", factor: float = 1, **changes):
        plug(FAMILY)
        values = {"model_type": "mine", "dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, **changes}
        generator, tensors = torch.Generator().manual_seed(0), {}
        for unit in families.get("mine").parse(values, "config.json").layout():
            for spec in unit.specs:
                drawn = torch.randn(spec.shape, generator=generator) / (
                    spec.shape[-1] ** 0.5 if len(spec.shape) > 1 else 4
                )
                drawn = drawn * factor if "down_proj" in spec.name else drawn
                tensors[spec.name] = drawn + 1 if "norm" in spec.name else drawn
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    return make


def applied(source, passes, **more):
    recipe = {"version": 1, "calibration": {"prompts": ["self"], "samples": 8, "length": 64}, "passes": passes, **more}
    path, out = source.parent / f"{source.name}.yaml", source.parent / f"{source.name}-out"
    path.write_text(yaml.safe_dump(recipe))
    pipeline.apply(pipeline.Job(load_recipe(str(path)), resolve(str(source)), out))
    return out


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_family_is_refused_by_file_and_breaks_no_other(compress_cli, plug, tmp_path, tiny, name):
    text, said = BROKEN[name]
    file = plug(text)
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    message = refusal_of_command(compress_cli("inspect", tmp_path))
    assert message.startswith(f"compress: {file}: ")
    assert said in message
    assert compress_cli("inspect", tiny).exit_code == compress_cli("--help").exit_code == 0


@pytest.mark.parametrize("layers", ["after", "before", "beside"])
def test_experts_are_found_wherever_they_stand_in_a_layer(compress_cli, make, layers):
    """They are counted, pruned, quantized, exported and checked."""
    source = make(layers=layers, multiplier=0.5)
    facts = json.loads(compress_cli("inspect", source, "--json").stdout)
    assert [layer["experts"] for layer in facts["layers"]] == [EXPERTS, EXPERTS]
    assert facts["parameters"] - facts["active_parameters"] == 2 * 3 * (EXPERTS - 2) * 16 * 40
    passes = [{"prune_experts": {"keep": KEPT}}, GPTQ]
    check = {"prompts": ["self"], "samples": 2, "length": 32}
    out = applied(source, passes, export=[{"onnx": {}}], check=check)
    assert json.loads((out / "checkpoint" / "config.json").read_text())["num_experts"] == KEPT
    model = Checkpoint(out / "checkpoint", allow_quantized=True).model
    assert [layer.num_experts for layer in model.layers] == [KEPT, KEPT]
    ids = torch.randint(3, 67, (1, 9), generator=torch.Generator().manual_seed(1))
    given = OnnxSession(out / "onnx" / "model.onnx", EXACT, threads=1).start(1).step(ids.numpy())
    np.testing.assert_allclose(given, own_logits(model, ids, [9]).numpy(), rtol=0, atol=1e-4)
    decoder = json.loads((out / "onnx" / "genai_config.json").read_text())["model"]["decoder"]
    assert [decoder[key] for key in ("num_attention_heads", "num_key_value_heads", "head_size")] == [5, 1, 6]


def test_layers_that_keep_their_states_narrower_are_calibrated_as_others(make, monkeypatch):
    """Windows begin with an empty past, which is the same in every type."""
    before = applied(make("before"), [GPTQ])
    monkeypatch.setattr(Mamba2, "states", in_bf16(Mamba2.states))
    monkeypatch.setattr(Attention, "states", in_bf16(Attention.states))
    after = applied(
        make("after"), [GPTQ], export=[{"onnx": {}}], check={"prompts": ["self"], "samples": 1, "length": 32}
    )
    first, second = (
        {
            name: tensor
            for path in (out / "checkpoint").glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for out in (before, after)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def in_bf16(states):
    return lambda block: tuple(replace(spec, precision=Precision("bf16")) for spec in states(block))


@pytest.mark.parametrize("layers", ["after", "before", "beside"])
def test_a_residual_multiplier_counts_in_what_experts_are_worth(make, layers):
    """Half of the experts' output is the output of experts with half the matrices."""
    halved, plain = make("halved", multiplier=0.5, layers=layers), make("plain", factor=0.5, layers=layers)
    if layers == "beside":  # there the multiplier is of both branches: the other one is made to give as much
        path = plain / "model.safetensors"
        leaving = ("o_proj.weight", "out_proj.weight")
        save_file({n: t * 0.5 if n.endswith(leaving) else t for n, t in load_file(path).items()}, path)
    passes = [{"prune_experts": {"keep": KEPT}}]
    found = [json.loads((applied(source, passes) / "report.json").read_text()) for source in (halved, plain)]
    assert found[0]["passes"][0]["details"]["layers"] == found[1]["passes"][0]["details"]["layers"]


# ---- layers that would be run or stored wrong


def layer(*blocks):
    residuals = tuple(Residual(f"norm{number}.weight", block, 1e-6) for number, block in enumerate(blocks))
    return lambda: Layer(3, "layers.3.", 40, residuals)


def experts(prefix):
    return Moe(prefix, 40, 16, 4, Router(f"{prefix}router.weight", 4, 2), gated=True)


@pytest.mark.parametrize("together", [layer, lambda a, b: layer(Parallel(((a, 1.0), (b, 1.0))))])
def test_two_blocks_with_experts_or_states_of_one_name_are_refused(together):
    expected = "layer 3 has 2 blocks with experts, expected one at most"
    assert refusal(together(experts("a."), experts("b."))) == expected
    two = [Mamba2(prefix, 40, 4, 10, 2, 5, 3, 1e-6) for prefix in ("a.", "b.")]
    assert "layer 3 has several states 'conv_state'" in refusal(together(*two))
    assert together(two[0], Attention("c.", 40, 5, 1, 6))().states
