"""What the runtimes are tried on, and what their logits are compared with."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import with_onnxruntime
from nemotron_h_models import VARIANTS
from test_onnx_formats import FORMATS, ROUNDED, SHAPES

from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.model.hybrid import HybridModel
from compress.recipe import resources
from compress.recipe.source import resolve
from compress.runtime.runtimes import Runtime, of_onnx

MODELS = ("tiny-jamba", "tiny-nemotron-h")
OTHERS = (
    "awkward", "every head its own group", "convolution without bias", "groups of experts", "latent projections with biases",
    "no Mamba", "Mamba alone",
)  # fmt: skip
NEMOTRON_H = {f"{name}, nemotron_h": VARIANTS[name] for name in OTHERS}
ONNX = sorted(
    name for name, path in resources.shipped_recipes().items() if "- onnx:" in path.read_text(encoding="utf-8")
)
RECIPES = {f"{recipe}, {model}": (recipe, model) for model in MODELS for recipe in ONNX}


class Exported(NamedTuple):
    """An output folder of `apply` with onnx/, and the logits onnxruntime (the one tested with) gives, products exact."""

    folder: Path
    vocabulary: int
    logits: dict[str, np.ndarray]

    @property
    def model(self) -> Path:
        return self.folder / "onnx" / "model.onnx"

    def stored(self) -> HybridModel:
        return Checkpoint(self.folder / "checkpoint", allow_quantized=True).model

    def row(self, runtime: str) -> Runtime:
        """What we say of a runtime beforehand."""
        return next(row for row in of_onnx(self.stored(), "onnx", "genai") if row.name == runtime)

    def minimum(self, runtime: str) -> str:
        return self.row(runtime).minimum


def exported(recipe, source: Path, out: Path) -> Exported:
    pipeline.apply(pipeline.Job(recipe, resolve(str(source)), out))
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    return Exported(out, vocabulary, with_onnxruntime.logits(str(out / "onnx" / "model.onnx"), vocabulary, "1"))


# how states may be kept: recurrent ones, a convolution's, a cache's
STATES = {
    "bf16": ("bf16", "bf16", "bf16"),
    "fp16": ("fp16", "fp16", "fp16"),
    "int8, stochastic, dynamic": ({"format": "int8", "rounding": "stochastic"}, "bf16", "int8"),
    "int4, stochastic, dynamic": ({"format": "int4", "rounding": "stochastic"}, "fp16", "int4"),
    "int8, static": ({"format": "int8", "scale": "static"},) * 3,
    "int4, static": ({"format": "int4", "scale": "static"},) * 3,
    "fp8-e4m3, dynamic": ("fp8-e4m3", "bf16", "fp8-e4m3"),
    "fp8-e4m3, static": ({"format": "fp8-e4m3", "scale": "static"},) * 3,
    "fp8-e4m3, stochastic": ({"format": "fp8-e4m3", "rounding": "stochastic"}, "bf16", "int8"),
    "int8 with feedback": ({"format": "int8", "rounding": "error_feedback"}, "fp16", "fp16"),
    "int4, every 3": ({"format": "int4", "rounding": "stochastic", "every": 3}, "fp16", "int8"),
    "int8 with feedback, every 2, blocks of d_inner": (
        {"format": "int8", "rounding": "error_feedback", "residual": "int4", "every": 2, "axis": "d_inner", "block": 3},
        "bf16", "int4",
    ),
}  # fmt: skip


def settings() -> dict[str, tuple[str, dict]]:
    """Name -> shape and pass: matrices in every format, every rounding of inputs and rotations, and states in every format.
    Nemotron-H, whose products are spelled as Jamba's, has its matrices in one format for every shape."""
    quantized = {name: (shape, {"quantize": options}) for name, (shape, options) in _quantized().items()}
    stored = {
        f"states in {name}, {shape}": (
            shape,
            {"state_precision": {"ssm_state": ssm, "conv_state": conv, "kv_cache": kv}},
        )
        for name, (ssm, conv, kv) in STATES.items()
        for shape in ("awkward", "awkward, nemotron_h")
    }
    return quantized | stored


def _quantized() -> dict[str, tuple[str, dict]]:
    named = {
        f"{number_format}, {shape}": (shape, {"weights": number_format})
        for number_format in FORMATS
        for shape in SHAPES
    }
    for weights, activation in ROUNDED:
        named[f"{weights}, {activation}"] = ("awkward", {"weights": weights, "activations": activation})
    rotated = {"weights": "int8", "activations": "dynamic-int8", "rotate": ["mlp", "experts"]}
    others = {f"int8, {shape}": (shape, {"weights": "int8"}) for shape in NEMOTRON_H}
    return named | {"int8, dynamic-int8, rotated": ("fitting tied", rotated)} | others


def rounds_while_it_runs(name: str) -> bool:
    """Inputs of matrices, or states: of a shipped recipe or one of `settings`."""
    return any(word in name for word in ("static", "dynamic", "w8a8", "state"))


def divergence(expected: np.ndarray, actual: np.ndarray) -> float:
    """Mean KL divergence in nats, over all places."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1)[..., None] for x in (expected, actual))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def assert_alike(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], is_rounding: bool, name: str):
    """To 1e-3 where only weights are stored in few bits. Where inputs or states are rounded too, the last bit of a float can
    tip a rounding: there the distributions must agree."""
    assert actual.keys() == expected.keys()
    for sequence, logits in expected.items():
        assert np.isfinite(actual[sequence]).all() and actual[sequence].shape == logits.shape, (name, sequence)
        if is_rounding:
            assert divergence(logits, actual[sequence]) <= 0.05, (name, sequence)
        else:
            assert np.abs(actual[sequence] - logits).max() <= 1e-3, (name, sequence)
