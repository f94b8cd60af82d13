"""What pruning must choose, store and lose, in plain float64 from what transformers' model shows; and runs of the pass."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jamba_models import make_jamba
from safetensors.torch import load_file
from transformers import JambaForCausalLM

from compress.apply import pipeline
from compress.prompts import self_text
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

EXPERTS, MOE_LAYERS = 5, (1, 4)
SPREAD = 0.7  # see test_jamba_forward.py: keeps the noise of float32 itself far below the bounds
WINDOWS = list(torch.randint(3, 67, (5, 71), generator=torch.Generator().manual_seed(11)))  # 71: a prime
CALIBRATION = {"prompts": ["self"], "samples": 5, "length": 71}
STRETCH, WITHHELD_OF = 64, 4


# ---- a MoE block


def gates_of(logits: np.ndarray, kept, top_k: int, *, rows_stay: bool = False) -> np.ndarray:
    """[T, E]: a token's `top_k` best of the experts `kept`, with their shares of those (or of all: `rows_stay`)."""
    shares, result = np.exp(logits - logits.max(1, keepdims=True)), np.zeros_like(logits)
    for token, row in enumerate(shares):
        whole = row.sum() if rows_stay else row[list(kept)].sum()
        for expert in sorted(kept, key=lambda expert: -row[expert])[:top_k]:
            result[token, expert] = row[expert] / whole
    return result


def withheld_of(windows: list[torch.Tensor]) -> np.ndarray:
    return np.array([
        (token // STRETCH + number) % WITHHELD_OF == WITHHELD_OF - 1
        for number, window in enumerate(windows) for token in range(len(window))
    ])  # fmt: skip


def expert_of(tensors: dict, layer: int, expert: int) -> list[np.ndarray]:
    """gate, up and down of one expert."""
    stem = f"model.layers.{layer}.feed_forward.experts.{expert}."
    return [tensors[f"{stem}{part}_proj.weight"].double().numpy() for part in ("gate", "up", "down")]


def inner_of(x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """What an expert's down_proj multiplies."""
    gated = x @ gate.T
    return gated / (1 + np.exp(-gated)) * (x @ up.T)


def outputs_of(x: np.ndarray, experts: list[list[np.ndarray]]) -> np.ndarray:
    """[T, E, H]: every expert on every token."""
    return np.stack([inner_of(x, gate, up) @ down.T for gate, up, down in experts], 1)


@dataclass
class Block:
    """T tokens at a MoE block: router logits [T, E], outputs of all experts [T, E, H], the states [T, H] they are added to,
    and which of the tokens are withheld."""

    logits: np.ndarray
    outputs: np.ndarray
    hidden: np.ndarray
    withheld: np.ndarray
    top_k: int = 2

    @property
    def experts(self) -> int:
        return self.logits.shape[1]

    @cached_property
    def gates(self) -> np.ndarray:
        return gates_of(self.logits, range(self.experts), self.top_k)

    @cached_property
    def given(self) -> np.ndarray:
        return np.einsum("te,teh->th", self.gates, self.outputs)

    @cached_property
    def importance(self) -> np.ndarray:
        return 1 / np.square(self.hidden + self.given).sum(1)

    def left_of(self, kept, router: str) -> np.ndarray:
        """What the experts `kept` give, not rescaled."""
        gates = gates_of(self.logits, kept, self.top_k, rows_stay=router == "keep_rows")
        return np.einsum("te,teh->th", gates, self.outputs)

    def factor(self, given: np.ndarray, tokens: np.ndarray) -> float:
        """The best one for all of `given`: weighted least squares with one unknown."""
        weight = np.sqrt(self.importance[tokens])[:, None]
        columns, wanted = (given[tokens] * weight).reshape(-1, 1), (self.given[tokens] * weight).ravel()
        return float(np.linalg.lstsq(columns, wanted, rcond=None)[0][0])

    def loss(self, given: np.ndarray, tokens: np.ndarray | None = None) -> float:
        """Mean of |y - y'|^2 / |h|^2 over the withheld tokens, or others."""
        tokens = self.withheld if tokens is None else tokens
        return float((np.square(self.given - given).sum(1) * self.importance)[tokens].mean())

    def loss_of(self, kept, router: str, tokens: np.ndarray | None = None) -> float:
        """Of the experts `kept`; with `rescale` at the factor that is best for those tokens."""
        tokens, given = self.withheld if tokens is None else tokens, self.left_of(kept, router)
        return self.loss(given * (self.factor(given, tokens) if router == "rescale" else 1), tokens)

    def best(self, count: int, router: str, tokens: np.ndarray | None = None) -> tuple[int, ...]:
        """All sets are tried."""
        return min(combinations(range(self.experts), count), key=lambda kept: self.loss_of(kept, router, tokens))

    def score(self, name: str) -> list[float]:
        """Of every expert, token by token, from those that are not withheld."""
        found = []
        for expert in range(self.experts):
            tokens = [token for token in np.flatnonzero(~self.withheld) if self.gates[token, expert] > 0]
            norms = {token: np.sqrt((self.outputs[token, expert] ** 2).sum()) for token in tokens}
            gates, fitted = self.gates[:, expert], int((~self.withheld).sum())
            found.append({
                "frequency": len(tokens) / fitted,
                "mean_gate": sum(gates[token] for token in tokens) / fitted,
                "ean": sum(norms.values()),
                "reap": sum(gates[token] * norms[token] for token in tokens) / max(1, len(tokens)),
            }[name])  # fmt: skip
        return found


def block_of(model: JambaForCausalLM, source: dict, layer: int, windows: list[torch.Tensor], top_k: int = 2) -> tuple:
    """The block of a layer with the router and experts of the tensors `source`, at the states that reach it in `model`;
    and x [T, H], what its router and experts see."""
    seen, module = {"x": [], "hidden": []}, model.model.layers[layer]

    def note(name):
        return lambda _, arguments: seen[name].append(arguments[0].detach().flatten(0, 1).double().numpy())

    hooks = [
        module.feed_forward.register_forward_pre_hook(note("x")),
        module.pre_ff_layernorm.register_forward_pre_hook(note("hidden")),
    ]
    with torch.no_grad():
        for window in windows:
            model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    x, hidden = (np.concatenate(blocks) for blocks in seen.values())
    router = source[f"model.layers.{layer}.feed_forward.router.weight"].double().numpy()
    outputs = outputs_of(x, [expert_of(source, layer, expert) for expert in range(len(router))])
    return Block(x @ router.T, outputs, hidden, withheld_of(windows), top_k), x


# ---- runs


@dataclass
class Run:
    report: dict
    out: Path

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint"

    @property
    def details(self) -> dict:
        return self.report["passes"][0]["details"]

    @property
    def layers(self) -> dict[int, dict]:
        return {entry["layer"]: entry for entry in self.details["layers"]}

    @property
    def kept(self) -> dict[int, tuple[int, ...]]:
        return {layer: tuple(entry["kept"]) for layer, entry in self.layers.items()}

    @property
    def config(self) -> dict:
        return json.loads((self.checkpoint / "config.json").read_text())

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        return tensors_in(self.checkpoint)

    @property
    def digests(self) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.checkpoint.iterdir()}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bytes_of(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bytes_of(found[name]) == bytes_of(tensor), name


def make_source(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """Five experts in layers 1 and 4."""
    return make_jamba(folder, dtype, **{"spread": SPREAD, "num_experts": EXPERTS, **changes})


def job_of(model: Path, folder: Path, *passes: dict, export: bool = False, **options) -> pipeline.Job:
    """Writes a recipe of `passes`; a pass that is none of its own is the block of `prune_experts`."""
    folder.mkdir(exist_ok=True)
    steps = [step if step.keys() & {"quantize", "leave_out"} else {"prune_experts": step} for step in passes]
    recipe = {"version": 1, "calibration": CALIBRATION, "passes": steps} | (
        {"export": [{"onnx": {}}]} if export else {}
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return pipeline.Job(load_recipe(str(folder / "recipe.yaml")), resolve(str(model)), folder / "out", **options)


def apply(model: Path, folder: Path, *passes: dict, windows=WINDOWS, **options) -> Run:
    """Runs a recipe of `passes` on calibration tokens that are no text: random models write none worth waiting for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_text, "windows", lambda *arguments: list(windows))
        job = job_of(model, folder, *passes, **options)
        return Run(pipeline.apply(job), job.out)
