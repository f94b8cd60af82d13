"""Calibrated runs through the whole pipeline, on small random models: what GPTQ, static activations and equalisation write,
against inputs that transformers' model shows; interruptions; refusals."""

import hashlib
import os
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from interruptions import stop_after
from jamba_models import load_reference, make_jamba
from refusals import refusal
from safetensors.torch import load_file, save_file

from compress import formats
from compress.apply import pipeline, sweep
from compress.calibration import inputs as calibration_inputs
from compress.calibration import moments as calibration_moments
from compress.calibration.inputs import LayerInputs, Wanted
from compress.calibration.moments import Moments
from compress.checkpoint.folder import SINGLE
from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.writer import ShardWriter
from compress.errors import InputError
from compress.output_folder.workspace import Workspace
from compress.passes.quantization import equalization
from compress.passes.quantization import gptq as gptq_method
from compress.passes.quantization import scales as scale_search
from compress.prompts import self_text
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.inference import Head, HiddenStates, LayerWeights, stream

LAYERS, SHARDS = 4, 6  # of the model: the embedding, its layers, the head
MOE_LAYERS, ATTENTION_LAYER = (1, 3), 2
CALIBRATION = {"prompts": ["self"], "samples": 5, "length": 24}
TOKENS = 5 * 24
FEW_LAYERS = {"num_hidden_layers": LAYERS, "expert_layer_period": 2}
ROUNDABLE = {
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    **FEW_LAYERS,
}
GPTQ = {"method": "gptq", "weights": "int4-g16", "min_tokens": 30}


@dataclass
class Applied:
    report: dict
    out: Path
    windows: list[torch.Tensor]  # the calibration tokens

    @property
    def details(self) -> dict:
        return self.report["passes"][0]["details"]

    @property
    def weights(self) -> dict:
        return {w.name: w for w in Checkpoint(self.out / "checkpoint", allow_quantized=True).model.weights}

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        return stored_in(self.out / "checkpoint")

    @property
    def digests(self) -> dict[str, str]:
        files = (self.out / "checkpoint").iterdir()
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stored_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def apply(model: Path, folder: Path, quantize: dict, *, calibration: dict = CALIBRATION, **options) -> Applied:
    """Writes a recipe with one pass and no export, and runs it, check off."""
    folder.mkdir(exist_ok=True)
    recipe = {"version": 1, "calibration": calibration, "passes": [{"quantize": quantize}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    used = []

    def noting(planned, context, space, windows):
        used.extend(windows or [])
        return run(planned, context, space, windows)

    with pytest.MonkeyPatch.context() as patch:
        run = sweep.run
        patch.setattr(sweep, "run", noting)
        job = pipeline.Job(load_recipe(str(folder / "recipe.yaml")), resolve(str(model)), folder / "out", **options)
        report = pipeline.apply(job)
    return Applied(report, folder / "out", used)


def change_weights(model: Path, change) -> Path:
    """Edits the tensors of a one-file model in place."""
    tensors = load_file(model / SINGLE)
    change(tensors)
    save_file(tensors, model / SINGLE, metadata={"format": "pt"})
    return model


def with_weights_of(reference: torch.nn.Module, applied: Applied) -> torch.nn.Module:
    """transformers' model with what was written in place of its own matrices, but for experts, which it stacks."""
    weights = applied.weights
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name in weights:
                parameter.copy_(weights[name].dense())
    return reference


def inputs_of(model: Path, windows: list[torch.Tensor], applied: Applied | None = None) -> dict[str, torch.Tensor]:
    """What reaches every module that transformers calls with a matrix, by the matrix's name: float64 [tokens, K]."""
    reference, found = load_reference(model), {}
    if applied is not None:
        reference = with_weights_of(reference, applied)

    def note(name):
        def hook(module, arguments):
            found.setdefault(name, []).append(arguments[0].detach().flatten(0, -2).double())

        return hook

    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith("router"):
            module.register_forward_pre_hook(note(f"{name}.weight"))
    with torch.no_grad():
        for window in windows:
            reference(window[None], use_cache=False)
    return {name: torch.cat(blocks) for name, blocks in found.items()}


@pytest.fixture(scope="module")
def roundable(tmp_path_factory) -> Path:
    """Matrices whose inputs are multiples of 16, but for dt_proj's."""
    return make_jamba(tmp_path_factory.mktemp("roundable"), torch.float32, spread=0.8, **ROUNDABLE)


@pytest.fixture(scope="module")
def gptq(roundable, tmp_path_factory) -> Applied:
    return apply(roundable, tmp_path_factory.mktemp("gptq"), GPTQ)


# ---- GPTQ


def errors(model: Path, applied: Applied, windows: list[torch.Tensor]) -> dict[str, float]:
    """|| X W' - X W'q ||^2 relative to || X W' ||^2, X being what reaches each matrix in the original model."""
    original, weights, found = load_file(model / SINGLE), applied.weights, {}
    for name, x in inputs_of(model, windows).items():
        if weights[name].is_quantized:
            weight, restored = original[name].double(), weights[name].dense().double()
            found[name] = float((x @ (weight - restored).T).square().sum() / (x @ weight.T).square().sum())
    return found


def test_gptq_writes_matrices_whose_outputs_are_closer_than_those_of_rounding(roundable, gptq, tmp_path):
    without = apply(roundable, tmp_path, {"method": "rtn", "weights": "int4-g16"})
    compensated, rounded = (errors(roundable, found, gptq.windows) for found in (gptq, without))
    assert compensated.keys() == rounded.keys() and len(rounded) > 15
    for name, error in compensated.items():
        # later layers were quantized for the inputs that the quantized layers before them give, which are not these
        assert error <= 1.1 * rounded[name], name
    assert sum(compensated.values()) < 0.7 * sum(rounded.values())


def test_gptq_in_int8_is_not_worse_than_rounding_on_a_model_of_awkward_shapes(small, tmp_path):
    found = {
        method: apply(small, tmp_path / method, {"method": method, "weights": "int8"}) for method in ("gptq", "rtn")
    }
    compensated, rounded = (errors(small, found[method], found["gptq"].windows) for method in ("gptq", "rtn"))
    assert sum(compensated.values()) < 0.9 * sum(rounded.values())


def test_scales_have_the_least_error_for_the_true_inputs_or_reach_the_largest_weight_where_clipping_is_off(
    roundable, tmp_path
):
    name, only = "model.layers.0.mamba.in_proj.weight", {"weights": "none", "roles": {"ssm_in": "int4-g16"}}
    number_format, weight = formats.get("int4-g16"), load_file(roundable / SINGLE)[name]
    found, windows = {}, None
    for method, clip in (("gptq", None), ("gptq", "none"), ("rtn", None), ("rtn", "mse")):
        options = {**only, "method": method} | ({"clip": clip} if clip else {})
        applied = apply(roundable, tmp_path / f"{method} {clip}", options)
        windows = windows or applied.windows
        found[method, clip] = applied.weights[name].load(None).scales
    square = inputs_of(roundable, windows)[name].square().mean(0).float()
    reaching, plain, weighted = (
        number_format.join_scales([scales])
        for scales in (
            number_format.absmax_scales(weight),
            scale_search.search(weight, number_format),
            scale_search.search(weight, number_format, square),
        )
    )
    assert torch.equal(found["gptq", "none"], reaching) and torch.equal(found["rtn", None], reaching)
    assert torch.equal(found["rtn", "mse"], plain)
    # float32 sums over the tokens may decide between two candidates that are as good
    assert (found["gptq", None] == weighted).float().mean() > 0.98
    assert (plain == weighted).float().mean() < 0.9 and (plain == reaching).float().mean() < 0.5


def test_every_matrix_is_fitted_to_the_inputs_that_those_quantized_before_it_give(roundable, tmp_path, monkeypatch):
    """The second moments GPTQ was called with, in the first layer, are those of transformers' with the written weights."""
    hessians, factor = [], gptq_method.factor

    def noting(hessian, **options):
        hessians.append(hessian.double())
        return factor(hessian, **options)

    monkeypatch.setattr(gptq_method, "factor", noting)
    applied = apply(roundable, tmp_path, GPTQ)
    true, original = inputs_of(roundable, applied.windows, applied), inputs_of(roundable, applied.windows)
    names = ["mamba.in_proj", "mamba.x_proj", "mamba.dt_proj", "mamba.out_proj"]
    names += [f"feed_forward.{part}_proj" for part in ("gate", "down")]  # up shares its input with gate
    for short, hessian in zip(names, hessians, strict=False):
        if short == "mamba.dt_proj":  # transformers does not call it as a module
            continue
        name = f"model.layers.0.{short}.weight"
        exact, size = products(true[name]), products(true[name]).abs().max()
        assert (hessian - exact).abs().max() <= 1e-4 * size, name  # float32, through a layer
        assert (products(original[name]) - exact).abs().max() > 1e-3 * size, name  # others than the original model's


@pytest.mark.parametrize(
    "options", [GPTQ, {"weights": "int4-g16", "activations": "static-int8"}], ids=["gptq", "static"]
)
def test_what_leaves_the_last_layer_in_calibration_is_what_the_written_checkpoint_gives(
    roundable, tmp_path, monkeypatch, options
):
    left, leave = {}, LayerInputs.leave

    def noting(layer, unit, following):
        leave(layer, unit, following)
        left[layer.index] = following.read(0)

    monkeypatch.setattr(LayerInputs, "leave", noting)
    applied = apply(roundable, tmp_path, options)
    assert list(left) == list(range(LAYERS))
    written = Checkpoint(applied.out / "checkpoint", allow_quantized=True).model
    (tmp_path / "scratch").mkdir()
    ((_, hidden),) = stream(written, applied.windows, tmp_path / "scratch")
    assert torch.equal(left[LAYERS - 1], hidden)


def test_the_matrices_and_the_embedding_are_in_the_format_asked_for_where_it_fits(gptq):
    formats_of = {name: weight.format for name, weight in gptq.weights.items()}
    assert {formats_of[n] for n in formats_of if n.endswith("dt_proj.weight")} == {"int8"}  # 10 inputs
    quantized = {n: f for n, f in formats_of.items() if f not in ("fp32", "int8")}
    assert set(quantized.values()) == {"int4-g16"}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= quantized.keys()


def test_a_format_that_does_not_fit_is_said_to_be_stored_otherwise(tmp_path):
    model = make_jamba(tmp_path / "model", hidden_size=128, num_attention_heads=4, mamba_expand=1, intermediate_size=96,
                       num_hidden_layers=3)  # fmt: skip
    applied = apply(model, tmp_path / "out", {"method": "gptq", "weights": "int4-g128"})
    assert {name: weight.format for name, weight in applied.weights.items() if "dt_proj.weight" in name} == {
        f"model.layers.{i}.mamba.dt_proj.weight": "int8" for i in (0, 1)
    }
    assert sorted(applied.details["stored_otherwise"], key=lambda entry: entry["role"]) == [
        {"role": "experts", "asked": "int4-g128", "stored": "int4-g32", "inputs": 96, "tensors": 3},
        {"role": "mlp", "asked": "int4-g128", "stored": "int4-g32", "inputs": 96, "tensors": 2},
        {"role": "ssm_dt_proj", "asked": "int4-g128", "stored": "int8", "inputs": 10, "tensors": 2},
    ]


def test_every_scale_that_was_written_is_finite_and_positive(gptq):
    scales = {name: tensor for name, tensor in gptq.stored.items() if name.endswith("weight_scale")}
    assert len(scales) > 30
    for name, scale in scales.items():
        assert torch.isfinite(scale).all() and (scale > 0).all(), name


def test_the_report_says_what_calibrated(gptq):
    calibration = gptq.report["calibration"]
    assert (calibration["tokens"], calibration["windows"], calibration["prompts"]) == (TOKENS, 5, ["self"])
    counts = {(e["layer"], e["expert"]): e["tokens"] for e in gptq.details["experts"]}
    assert counts.keys() == {(layer, expert) for layer in MOE_LAYERS for expert in range(3)}
    for layer in MOE_LAYERS:
        assert sum(counts[layer, expert] for expert in range(3)) == 2 * TOKENS  # two experts a token
    assert calibration["expert_coverage"]["min_tokens"] == min(counts.values())


def test_the_same_recipe_and_seed_give_the_same_bytes_and_another_seed_others(roundable, gptq, tmp_path):
    assert apply(roundable, tmp_path / "again", GPTQ).digests == gptq.digests
    other = apply(roundable, tmp_path / "other", GPTQ, seed=1)
    assert not torch.equal(torch.stack(other.windows), torch.stack(gptq.windows))
    assert other.digests != gptq.digests


def test_a_budget_for_the_moments_of_one_group_at_a_time_gives_the_same_bytes(roundable, gptq, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_inputs, "MOMENT_BYTES", 1)
    assert apply(roundable, tmp_path, GPTQ).digests == gptq.digests


def test_hidden_states_are_gone_when_the_output_is_published(gptq):
    assert not (gptq.out / "calibration").exists()
    assert not [path for path in gptq.out.rglob("*") if path.suffix in (".f32", ".tmp") or "note-" in path.name]
    assert not gptq.out.with_name("out.partial").exists()


# ---- experts


def with_an_unreached_expert(folder: Path) -> Path:
    """Five experts, two a token: the router gives u, -u, v, -v and 0, and two of the first four are always above 0."""
    model = make_jamba(folder, torch.float32, num_experts=5, spread=0.8, **{**ROUNDABLE, "num_hidden_layers": 3})

    def change(tensors):
        router = tensors["model.layers.1.feed_forward.router.weight"]
        router[1], router[3], router[4] = -router[0], -router[2], 0.0

    return change_weights(model, change)


UNREACHED = "model.layers.1.feed_forward.experts.4."


def test_an_expert_that_no_token_reaches_is_quantized_from_every_token_and_the_report_says_so(tmp_path):
    model = with_an_unreached_expert(tmp_path / "model")
    options = {"method": "gptq", "weights": "int4-g16", "min_tokens": 1}
    applied = apply(model, tmp_path / "gptq", options)
    assert applied.report["calibration"]["expert_coverage"] == {
        "min_tokens": 0, "experts_below_threshold": ["layer 1 expert 4"],
        "below_threshold": "saw fewer tokens than min_tokens, and were calibrated on all of their layer",
    }  # fmt: skip
    assert [(entry["matrices"], entry["tokens"], entry["tokens_used"], entry["expert"])
            for entry in applied.details["experts_from_every_token"]] == [
        ([f"feed_forward.experts.4.{part}_proj.weight" for part in parts], 0, TOKENS, 4)
        for parts in (("gate", "up"), ("down",))
    ]  # fmt: skip
    scales = [tensor for name, tensor in applied.stored.items() if name.startswith(UNREACHED) and "_scale" in name]
    assert len(scales) == 3 and all(torch.isfinite(s).all() and (s > 0).all() for s in scales)
    # the inputs it would have had, had it been reached: the norm's output
    x = inputs_of(model, applied.windows)["model.layers.1.feed_forward.router.weight"]
    original = load_file(model / SINGLE)
    rounded = apply(model, tmp_path / "rtn", {**options, "method": "rtn"})

    def error(found: Applied, name: str, x: torch.Tensor) -> float:
        return float((x @ (original[name] - found.weights[name].dense()).double().T).square().sum())

    for part in ("gate", "up"):
        assert error(applied, f"{UNREACHED}{part}_proj.weight", x) < error(rounded, f"{UNREACHED}{part}_proj.weight", x)
    gate, up = (x @ original[f"{UNREACHED}{part}_proj.weight"].double().T for part in ("gate", "up"))
    down = f"{UNREACHED}down_proj.weight"
    assert error(applied, down, F.silu(gate) * up) < error(rounded, down, F.silu(gate) * up)


def test_an_expert_that_saw_too_few_tokens_is_named(roundable, gptq, tmp_path):
    tokens = sorted(entry["tokens"] for entry in gptq.details["experts"])
    assert tokens[0] < tokens[-1]
    applied = apply(roundable, tmp_path, {**GPTQ, "min_tokens": tokens[-1]})
    below = {(e["layer"], e["expert"]) for e in applied.details["experts"] if e["tokens"] < tokens[-1]}
    named = {f"layer {layer} expert {expert}" for layer, expert in below}
    assert below and set(applied.report["calibration"]["expert_coverage"]["experts_below_threshold"]) == named
    assert {(e["layer"], e["expert"]) for e in applied.details["experts_from_every_token"]} == below
    assert applied.digests != gptq.digests


@pytest.fixture
def moe_layer(roundable, tmp_path):
    """Layer 1 with hidden states in two blocks; (inputs, unit, input of the feed-forward for every token in float64)."""
    windows = [torch.arange(i, i + 11) % 67 for i in (3, 20, 41)]
    reference, seen = load_reference(roundable), []
    layer = reference.model.layers[1]
    layer.feed_forward.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].double()))
    entering = []
    layer.register_forward_pre_hook(lambda module, arguments: entering.append(arguments[0]))
    with torch.no_grad():
        for window in windows:
            reference(window[None], use_cache=False)
    model = Checkpoint(roundable).model
    states = HiddenStates(tmp_path, windows, 48, tokens=22).at(tmp_path / "states")
    assert len(states) == 2
    for number, block in enumerate(states.blocks):
        states.write(number, torch.cat([entering[i] for i in block]))
    found = LayerInputs(model, 1, states, tmp_path / "mixed", lambda weight: weight, "cpu")
    return found, model.unit("layer.1"), torch.cat(seen).flatten(0, 1)


def expert_moments(layer: LayerInputs, unit) -> dict:
    """(expert, first matrix) -> moments of what routing sends there."""
    wanted = Wanted(hessian=True)
    with torch.inference_mode():
        return {
            (group.expert, group.names[0].split(".")[-2]): moments
            for level in layer.levels if level[0].expert is not None
            for group, moments in layer.moments(unit, level, wanted)
        }  # fmt: skip


def products(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def assert_moments(moments: Moments, x: torch.Tensor) -> None:
    assert moments.tokens == len(x)
    size = products(x).abs().max()
    assert (moments.hessian.double() - products(x)).abs().max() <= 1e-4 * size  # float32, through a whole layer
    assert (moments.square.double() - x.square().mean(0)).abs().max() <= 1e-4 * size
    torch.testing.assert_close(moments.absmax.double(), x.abs().amax(0), rtol=1e-3, atol=1e-4)


def inner_of(unit, expert: int, x: torch.Tensor) -> torch.Tensor:
    prefix = f"model.layers.1.feed_forward.experts.{expert}."
    gate, up = (x @ unit.weights[f"{prefix}{part}_proj.weight"].dense().double().T for part in ("gate", "up"))
    return F.silu(gate) * up


def test_moments_of_an_expert_are_those_of_the_tokens_that_routing_sends_there(moe_layer):
    layer, unit, x = moe_layer
    router = unit.weights["model.layers.1.feed_forward.router.weight"].dense().double()
    chosen = (x @ router.T).topk(2, -1).indices
    found = expert_moments(layer, unit)
    assert found.keys() == {(expert, part) for expert in range(3) for part in ("gate_proj", "down_proj")}
    for expert in range(3):
        rows = x[(chosen == expert).any(-1)]
        assert 0 < len(rows) < len(x)
        assert_moments(found[expert, "gate_proj"], rows)
        assert_moments(found[expert, "down_proj"], inner_of(unit, expert, rows))


def test_moments_of_every_token_are_those_of_all_tokens_of_the_layer(moe_layer):
    layer, unit, x = moe_layer
    with torch.inference_mode():
        gate, down = (next(layer.moments(unit, level, Wanted()))[0] for level in layer.levels[-2:])
        assert_moments(layer.moments_of_every_token(unit, gate, Wanted(hessian=True)), x)
        assert_moments(layer.moments_of_every_token(unit, down, Wanted(hessian=True)), inner_of(unit, 0, x))


def test_moments_of_every_token_stop_at_a_number_of_rows(moe_layer, monkeypatch):
    monkeypatch.setattr(calibration_inputs, "EVERY_TOKEN_ROWS", 20)  # reached with the first block of 22
    layer, unit, x = moe_layer
    with torch.inference_mode():
        gate, _ = next(layer.moments(unit, layer.levels[-2], Wanted()))
        assert_moments(layer.moments_of_every_token(unit, gate, Wanted(hessian=True)), x[:22])


def test_no_more_moments_are_in_memory_than_the_budget_is_for(moe_layer, monkeypatch):
    """Three experts, two in the budget: those of the first two are gone when the third's are made, but the one in use."""
    layer, unit, x = moe_layer
    wanted, made, most = Wanted(hessian=True), weakref.WeakSet(), []

    class Counted(Moments):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.add(self)
            most.append(len(made))

    monkeypatch.setattr(calibration_inputs, "Moments", Counted)
    monkeypatch.setattr(calibration_inputs, "MOMENT_BYTES", 2 * wanted.bytes(x.shape[1]))
    with torch.inference_mode():
        for _, _moments in layer.moments(unit, layer.levels[-2], wanted):
            most.append(len(made))
    assert len(most) == 2 * 3 and max(most) == 2


@pytest.mark.parametrize("every_token", [True, False])
def test_what_one_group_sees_costs_no_product_that_comes_after(moe_layer, monkeypatch, every_token):
    layer, unit, _ = moe_layer
    multiplied, linear = [], LayerWeights.linear

    def recorded(self, name, *arguments):
        found = linear(self, name, *arguments)
        multiplied.append(name)
        return found

    with torch.inference_mode():
        up = next(group for group, _ in layer.moments(unit, layer.levels[-2], Wanted()) if group.expert == 1)
        monkeypatch.setattr(LayerWeights, "linear", recorded)
        if every_token:
            found = layer.moments_of_every_token(unit, up, Wanted(hessian=True))
        else:
            [(_, found)] = layer.moments(unit, (up,), Wanted(hessian=True))
    assert found.tokens > 0
    assert not [name for name in multiplied if ".experts." in name]


# ---- statistics


def test_moments_add_up_over_blocks_with_and_without_a_hessian():
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    flat = x.flatten(0, 1).double()
    for with_hessian in (True, False):
        moments = Moments(5, "cpu", with_hessian=with_hessian, with_sample=False)
        for block in (x, torch.zeros(0, 5), 10 * x[:1]):
            moments.add(block, "m")
        rows = torch.cat([flat, 10 * flat[:7]])
        assert moments.tokens == 28
        torch.testing.assert_close(moments.square.double(), rows.square().mean(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(moments.absmax.double(), rows.abs().amax(0), rtol=1e-6, atol=0)
        if with_hessian:
            torch.testing.assert_close(moments.hessian.double(), products(rows), rtol=1e-5, atol=1e-5)


def test_nothing_added_is_zero_everywhere():
    moments = Moments(3, "cpu", with_hessian=True, with_sample=True)
    assert not moments.hessian.any() and not moments.square.any() and not moments.absmax.any()
    assert moments.sample.tolist() == [0.0] and moments.tokens == 0


def test_a_sample_holds_all_rows_while_they_are_few_and_later_rows_in_even_steps(monkeypatch):
    monkeypatch.setattr(calibration_moments, "SAMPLE_ROWS", 8)
    moments = Moments(1, "cpu", with_hessian=False, with_sample=True)
    moments.add(-torch.arange(5.0)[:, None], "m")
    assert moments.sample.tolist() == [0, 1, 2, 3, 4]
    for start in range(5, 100, 5):
        moments.add(-torch.arange(start, start + 5.0)[:, None], "m")
    assert moments.sample.tolist() == list(range(0, 100, 16))  # early rows count as much as late ones
    assert moments.tokens == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_inputs_that_are_not_finite_are_refused_with_the_name_of_the_matrix(value):
    x = torch.ones(4, 3)
    x[2, 1] = value
    moments = Moments(3, "cpu", with_hessian=True, with_sample=False)
    assert "'some.matrix'" in refusal(lambda: moments.add(x, "some.matrix"))


# ---- models that overflow


@pytest.fixture
def random_text(monkeypatch):
    """Calibration text for models that cannot write any."""
    drawn = torch.randint(3, 67, (5, 24), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(self_text, "windows", lambda *arguments: list(drawn))


WITH_STATISTICS = {
    "gptq": {"method": "gptq", "weights": "int8"},
    "static activations": {"weights": "int8", "activations": "static-int8"},
    "equalize": {"weights": "int8", "equalize": 0.5},
}


@pytest.mark.parametrize("options", WITH_STATISTICS.values(), ids=list(WITH_STATISTICS))
def test_a_model_that_overflows_is_refused_with_the_name_of_the_matrix(tmp_path, random_text, options):
    def change(tensors):
        tensors["model.layers.0.feed_forward.up_proj.weight"][:] = 3e38

    model = change_weights(make_jamba(tmp_path / "model", torch.float32, num_hidden_layers=3), change)
    message = refusal(lambda: apply(model, tmp_path / "run", options))
    assert "'model.layers.0.feed_forward.down_proj.weight'" in message
    assert not list((tmp_path / "run").glob("out*"))


def test_inputs_whose_squares_overflow_are_refused_or_handled_but_no_traceback(tmp_path, random_text):
    def change(tensors):
        tensors["model.layers.0.feed_forward.up_proj.weight"] *= 1e22

    model = change_weights(make_jamba(tmp_path / "model", torch.float32, num_hidden_layers=3), change)
    try:
        applied = apply(model, tmp_path / "run", {"method": "gptq", "weights": "int8"})
    except InputError as error:
        assert "'model.layers.0.feed_forward.down_proj.weight'" in str(error)
    else:
        assert all(torch.isfinite(weight.dense()).all() for weight in applied.weights.values())


def test_a_model_that_cannot_write_its_own_calibration_text_is_refused(tmp_path):
    def change(tensors):
        tensors["model.layers.0.feed_forward.up_proj.weight"][:] = 3e38

    model = change_weights(make_jamba(tmp_path / "model", torch.float32, num_hidden_layers=3), change)
    refusal(lambda: apply(model, tmp_path / "run", {"method": "gptq", "weights": "int8"}))


# ---- static activations

STATIC = {"activations": "static-int8", "weights": "int8", "roles": {"experts": "none"}}


def input_scales(applied: Applied) -> dict[str, float]:
    return {
        name.removesuffix("input_scale") + "weight": float(tensor)
        for name, tensor in applied.stored.items()
        if name.endswith("input_scale")
    }


def alone(role: str) -> dict:
    """Only one role is quantized, so that its first layer sees what it sees in the original model."""
    return {"weights": "none", "roles": {role: "int8"}, "activations": "static-int8"}


ALONE = {
    "attention_qkv": [f"model.layers.{ATTENTION_LAYER}.self_attn.{part}_proj.weight" for part in "qkv"],
    "attention_out": [f"model.layers.{ATTENTION_LAYER}.self_attn.o_proj.weight"],
    "mlp": [f"model.layers.0.feed_forward.{part}_proj.weight" for part in ("gate", "up")],
    "ssm_in": ["model.layers.0.mamba.in_proj.weight"],
    "lm_head": ["lm_head.weight"],
}


@pytest.mark.parametrize("role", ALONE)
def test_a_static_scale_is_the_largest_true_input_over_127(roundable, tmp_path, role):
    applied = apply(roundable, tmp_path, alone(role))
    scales, true = input_scales(applied), inputs_of(roundable, applied.windows)
    assert set(ALONE[role]) <= scales.keys()
    for name in ALONE[role]:
        assert scales[name] == pytest.approx(float(true[name].abs().max()) / 127, rel=1e-4), name


def test_a_static_fp8_scale_is_the_largest_true_input_over_448(roundable, tmp_path):
    applied = apply(roundable, tmp_path, {**alone("mlp"), "weights": "none", "roles": {"mlp": "fp8-e4m3"},
                                          "activations": "static-fp8"})  # fmt: skip
    scales, true = input_scales(applied), inputs_of(roundable, applied.windows)
    for name in ALONE["mlp"]:
        assert scales[name] == pytest.approx(float(true[name].abs().max()) / 448, rel=1e-4), name


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_other_ranges_look_at_the_sample_of_true_inputs(roundable, tmp_path, method):
    options = {**alone("mlp"), "activation_range": method, "percentile": 0.99}
    applied = apply(roundable, tmp_path, options)
    x = inputs_of(roundable, applied.windows)[ALONE["mlp"][0]].abs().numpy()
    scale = input_scales(applied)[ALONE["mlp"][0]]
    if method == "percentile":
        assert scale == pytest.approx(np.quantile(x, 0.99) / 127, rel=1e-3)
    else:
        tried = [x.max() * 0.93**power / 127 for power in range(60)]
        losses = [np.square(np.clip(np.rint(x / s), -128, 127) * s - x).mean() for s in tried]
        assert scale == pytest.approx(tried[int(np.argmin(losses))], rel=1e-4)


def test_in_a_whole_model_every_scale_fits_the_inputs_that_the_written_model_gives(roundable, tmp_path):
    """transformers' model with the written weights, its inputs rounded by hooks with the written scales as they come."""
    applied = apply(roundable, tmp_path, STATIC)
    scales, reference, largest = input_scales(applied), with_weights_of(load_reference(roundable), applied), {}

    def rounding(name):
        def hook(module, arguments):
            x, scale = arguments[0], scales[name]
            largest[name] = max(largest.get(name, 0.0), float(x.abs().max()))
            return (torch.clamp(torch.round(x / scale), -128, 127) * scale, *arguments[1:])

        return hook

    with torch.no_grad():
        for name, module in reference.named_modules():
            if f"{name}.weight" in scales:
                module.register_forward_pre_hook(rounding(f"{name}.weight"))
        for window in applied.windows:
            reference(window[None], use_cache=False)
    assert largest.keys() == scales.keys() and len(scales) == 3 + 4 + 2 * 3 + 1  # in_proj, attention, MLPs, head
    for name, scale in scales.items():
        # a value that float32 sums tip over the middle between two integers moves what follows by a step
        assert largest[name] == pytest.approx(127 * scale, rel=0.01), name


def test_dynamic_activations_need_no_calibration_and_store_no_scale(roundable, tmp_path):
    applied = apply(roundable, tmp_path, {"weights": "int8", "activations": "dynamic-int8"})
    assert applied.windows == [] and "calibration" not in applied.report
    assert not input_scales(applied)


def test_static_scales_work_beside_gptq_and_without_it_alike(roundable, tmp_path):
    found = {
        method: input_scales(apply(roundable, tmp_path / method, {**alone("mlp"), "method": method}))
        for method in ("rtn", "gptq")
    }
    for name in ALONE["mlp"]:
        assert found["gptq"][name] == found["rtn"][name]


# ---- equalisation


def logits(folder: Path, windows: list[torch.Tensor], scratch: Path) -> torch.Tensor:
    model = Checkpoint(folder).model
    scratch.mkdir()
    with torch.inference_mode():
        head = Head(model, "cpu")
        return torch.cat([head(hidden) for _, hidden in stream(model, windows, scratch)])


# float16 is left no more than 2^-24 apart below its smallest normal number, where dividing by a power of two rounds
EQUALIZED = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 1e-5}


@pytest.mark.parametrize(("dtype", "tolerance"), EQUALIZED.items())
def test_equalising_without_quantizing_leaves_the_model_the_same_function_bit_for_bit(tmp_path, dtype, tolerance):
    model = make_jamba(tmp_path / "model", dtype)
    applied = apply(model, tmp_path, {"weights": "none", "equalize": 0.5})
    before, after = load_file(model / SINGLE), applied.stored
    changed = {name.split(".", 3)[-1] for name in before if not torch.equal(before[name], after[name])}
    assert {"input_layernorm.weight", "pre_ff_layernorm.weight", "mamba.in_proj.weight"} <= changed
    assert {"self_attn.q_proj.weight", "feed_forward.down_proj.weight", "feed_forward.router.weight"} <= changed
    assert not {"mamba.x_proj.weight", "mamba.dt_proj.weight", "mamba.out_proj.weight", "mamba.conv1d.weight"} & changed
    found = logits(applied.out / "checkpoint", applied.windows, tmp_path / "found")
    assert (found - logits(model, applied.windows, tmp_path / "expected")).abs().max() <= tolerance


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> Path:
    """Channels that carry up to a thousand times what others do."""

    def change(tensors):
        for number, name in enumerate(sorted(tensors)):
            if name.endswith(("input_layernorm.weight", "pre_ff_layernorm.weight")):
                tensors[name] *= 10 ** (3 * torch.rand(48, generator=torch.Generator().manual_seed(number)) - 2)

    folder = tmp_path_factory.mktemp("uneven")
    return change_weights(make_jamba(folder, torch.float32, spread=0.8, **ROUNDABLE), change)


@pytest.mark.parametrize("strength", [0.2, 0.8])
def test_the_factors_balance_the_true_inputs_against_the_columns_of_all_matrices_they_reach(uneven, tmp_path, strength):
    applied = apply(uneven, tmp_path, {"weights": "none", "equalize": strength})
    before, after, true = load_file(uneven / SINGLE), applied.stored, inputs_of(uneven, applied.windows)
    layer = f"model.layers.{ATTENTION_LAYER}."
    cases = {
        f"{layer}input_layernorm.weight": [f"{layer}self_attn.{part}_proj.weight" for part in "qkv"],
        "model.layers.0.pre_ff_layernorm.weight": ALONE["mlp"],
        "model.layers.0.feed_forward.up_proj.weight": ["model.layers.0.feed_forward.down_proj.weight"],
    }
    for source, targets in cases.items():
        columns = torch.stack([before[name].abs().amax(0) for name in targets]).amax(0)
        factors = equalization.factors(true[targets[0]].abs().amax(0).float(), columns, strength)
        assert len(factors.unique()) > 1
        for name in targets:
            undone = after[name]
            if name != "model.layers.0.feed_forward.down_proj.weight" and "up_proj" in name:
                undone = after[name] * up_rows(before, true, strength)[:, None]
            assert torch.equal(undone, before[name] * factors), name
        if "layernorm" in source:
            assert torch.equal(after[source], before[source] / factors), source


def up_rows(before: dict, true: dict, strength: float) -> torch.Tensor:
    """What the rows of layer 0's up_proj were divided by: the factors of down_proj's inputs."""
    name = "model.layers.0.feed_forward.down_proj.weight"
    return equalization.factors(true[name].abs().amax(0).float(), before[name].abs().amax(0), strength)


def test_equalised_weights_are_what_is_quantized(uneven, tmp_path):
    """int8 within half a step of what equalising alone writes, in the first layer, whose inputs are the same."""
    options = {"equalize": 0.5, "roles": {"embedding": "none", "ssm_in": "none", "ssm_out": "none"}}
    plain = apply(uneven, tmp_path / "plain", {"weights": "none", "equalize": 0.5}).stored
    before, weights = (
        load_file(uneven / SINGLE),
        apply(uneven, tmp_path / "int8", {"weights": "int8", **options}).weights,
    )
    for name in ALONE["mlp"]:
        step = plain[name].abs().amax(1, keepdim=True) / 127
        assert weights[name].format == "int8" and not torch.equal(plain[name], before[name])
        # x_proj and dt_proj are int8 here, so that a factor may lie on the other side of a tie; none does
        assert ((weights[name].dense() - plain[name]).abs() <= 0.5001 * step).all(), name


def test_equalising_helps_where_a_few_channels_carry_most(uneven, tmp_path):
    """Static int8 inputs of the first MLP: with one scale for all channels, small ones drown unless they are evened out."""
    options = {"weights": "none", "roles": {"mlp": "int8"}, "activations": "static-int8"}
    losses = {}
    for strength in (None, 0.5):
        applied = apply(uneven, tmp_path / str(strength), options | ({"equalize": strength} if strength else {}))
        name, stored = ALONE["mlp"][0], applied.stored
        x = inputs_of(uneven, applied.windows)[name].float()
        norm = stored["model.layers.0.pre_ff_layernorm.weight"]
        given = x * norm / load_file(uneven / SINGLE)["model.layers.0.pre_ff_layernorm.weight"]
        scale = input_scales(applied)[name]
        rounded = torch.round(given / scale).clamp(-128, 127) * scale
        exact = x @ load_file(uneven / SINGLE)[name].T
        losses[strength] = float((rounded @ applied.weights[name].dense().T - exact).square().mean())
    assert losses[0.5] < 0.5 * losses[None]


# ---- interruptions


POINTS = [
    *((ShardWriter, "publish", calls) for calls in (2, SHARDS - 1)),
    *((ShardWriter, "write", calls) for calls in (5, 40)),  # inside a layer
    *((Workspace, "mark_done", calls) for calls in (2, 5)),  # between the end of a piece and its note
    (HiddenStates, "write", 4),
]


def interrupted(model: Path, folder: Path, owner, name: str, calls: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, owner, name, calls)
        with pytest.raises(KeyboardInterrupt):
            apply(model, folder, GPTQ)
    assert not (folder / "out").exists() and (folder / "out.partial").is_dir()


@pytest.mark.parametrize(("owner", "name", "calls"), POINTS, ids=[f"{o.__name__}.{n} {c}" for o, n, c in POINTS])
def test_a_calibrated_run_that_was_interrupted_resumes_to_the_same_bytes(roundable, gptq, tmp_path, owner, name, calls):
    interrupted(roundable, tmp_path, owner, name, calls)
    resumed = apply(roundable, tmp_path, GPTQ, resume=True)
    assert resumed.digests == gptq.digests
    assert {k: v for k, v in resumed.details.items() if k != "layers_reused"} == {
        k: v for k, v in gptq.details.items() if k != "layers_reused"
    }
    assert resumed.report["calibration"] == gptq.report["calibration"]
    if (name, calls) in (("publish", 2), ("publish", SHARDS - 1), ("write", 40)):
        assert 0 < resumed.details["layers_reused"] <= LAYERS
    assert not list(resumed.out.rglob("*.f32"))


def test_a_calibrated_run_one_of_whose_shards_lost_its_end_is_resumed_to_the_same_bytes(roundable, gptq, tmp_path):
    interrupted(roundable, tmp_path, ShardWriter, "publish", 4)
    shard = tmp_path / "out.partial" / "checkpoint" / f"model-00003-of-{SHARDS:05d}.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    assert apply(roundable, tmp_path, GPTQ, resume=True).digests == gptq.digests


DAMAGED = {
    "a shard": f"checkpoint/model-00003-of-{SHARDS:05d}.safetensors",
    "the states that come next": "calibration/states.4/hidden-00000.f32",
    "a note": "calibration/note-0-00002.json",
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=list(DAMAGED))
def test_what_was_calibrated_after_a_damaged_piece_is_made_again(roundable, gptq, tmp_path, damaged):
    interrupted(roundable, tmp_path, ShardWriter, "publish", 4)
    path = tmp_path / "out.partial" / damaged
    data = bytearray(path.read_bytes())
    data[-len(data) // 3] ^= 1
    path.write_bytes(data)
    resumed = apply(roundable, tmp_path, GPTQ, resume=True)
    assert resumed.digests == gptq.digests
    assert resumed.details["layers_reused"] == 0
    assert {**resumed.details, "layers_reused": 0} == {**gptq.details, "layers_reused": 0}


def test_a_damaged_model_leaves_nothing_to_resume(tmp_path, random_text):
    def change(tensors):
        tensors["model.layers.1.mamba.in_proj.weight"][0, 0] = float("nan")

    model = change_weights(make_jamba(tmp_path / "model", torch.float32, num_hidden_layers=3), change)
    message = refusal(lambda: apply(model, tmp_path / "run", {"method": "gptq", "weights": "int8"}))
    assert "'model.layers.1.mamba.in_proj.weight'" in message
    assert not list((tmp_path / "run").glob("out*"))


# ---- the recipe's block


def refused_recipe(folder: Path, block: str, rest: str = "") -> tuple[str, str]:
    """The sentence that refuses a recipe with this `calibration` block, and the recipe's path."""
    path = folder / "recipe.yaml"
    path.write_text(f"version: 1\npasses:\n  - quantize: {{method: gptq}}\ncalibration:\n{block}\n{rest}\n")
    return refusal(lambda: load_recipe(str(path))), str(path)


REFUSED = {
    "heldout is for checks": ("  prompts: [heldout]", 5, "heldout"),
    "twice the same": ("  prompts: [prose, self, prose]", 5, "twice"),
    "no prompts": ("  prompts: []", 5, "prompts"),
    "unknown key": ("  samples: 3\n  sample: 4", 6, "sample"),
    "no samples": ("  samples: 0", 5, "samples"),
    "a truth value": ("  samples: yes", 5, "samples"),
    "too short": ("  prompts: [self]\n  length: 1", 6, "length"),
}


@pytest.mark.parametrize(("block", "line", "word"), REFUSED.values(), ids=list(REFUSED))
def test_a_block_that_makes_no_sense_is_refused_with_file_and_line(tmp_path, block, line, word):
    message, path = refused_recipe(tmp_path, block)
    assert message.startswith(f"{path}:{line}: ") and word in message


def test_an_unknown_key_names_the_nearest_that_is_known(tmp_path):
    assert "samples" in refused_recipe(tmp_path, "  sampels: 3")[0]


def test_a_prompt_set_that_calibrates_and_checks_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("text")
    message, path = refused_recipe(tmp_path, "  prompts: [mine.txt]", "check:\n  prompts: [mine.txt]")
    assert message.startswith(path) and "'mine.txt'" in message


def test_generated_prompts_may_calibrate_and_check_because_their_seeds_differ(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("version: 1\ncalibration: {prompts: [self]}\ncheck: {prompts: [self]}\n")
    assert load_recipe(str(path)).recipe.calibration.prompts == ("self",)


def test_a_missing_calibration_file_is_refused_before_any_work(roundable, tmp_path):
    message = refusal(lambda: apply(roundable, tmp_path, GPTQ, calibration={"prompts": ["absent.txt"]}))
    assert "absent.txt" in message
    assert not list(tmp_path.glob("out*"))


def written_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.fixture
def applied_with(tmp_path, small):
    """Applies passes (YAML) to the small random model, calibrated on little; returns the checkpoint folder."""

    def apply(passes: str, name: str = "out", model: Path = small, **job) -> Path:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(f"version: 1\ncalibration: {{prompts: [self], samples: 4, length: 32}}\npasses: {passes}\n")
        pipeline.apply(pipeline.Job(load_recipe(str(recipe)), resolve(str(model)), tmp_path / name, **job))
        return tmp_path / name / "checkpoint"

    return apply


def test_a_later_pass_leaves_what_an_earlier_one_quantized_as_it_was(applied_with):
    first = "{quantize: {method: rtn, weights: none, roles: {experts: int4-g16}}}"
    alone = written_tensors(applied_with(f"[{first}]", "alone"))
    both = written_tensors(
        applied_with(f"[{first}, {{quantize: {{method: gptq, weights: int8, roles: {{experts: none}}}}}}]")
    )
    experts = [name for name in alone if ".experts." in name]
    assert experts and all(torch.equal(alone[name], both[name]) for name in experts)
    assert any(name.endswith("in_proj.weight_packed") for name in both)


def test_a_plain_format_of_a_later_pass_is_what_is_written(applied_with, tmp_path):
    source = make_jamba(tmp_path / "source", dtype=torch.float16, spread=0.7)
    override = "overrides: [{role: attention_qkv, projections: [q_proj], weights: int8}]"
    later = "overrides: [{role: attention_qkv, projections: [k_proj, v_proj], weights: bf16}]"
    passes = f"[{{quantize: {{method: gptq, weights: none, {override}}}}}, {{quantize: {{weights: none, {later}}}}}]"
    written = {w.name: w for w in Checkpoint(applied_with(passes, model=source), allow_quantized=True).model.weights}
    for weight in Checkpoint(source).model.weights:
        if weight.name.endswith(("k_proj.weight", "v_proj.weight")):
            assert written[weight.name].format == "bf16"
            assert torch.equal(written[weight.name].dense(), weight.dense().to(torch.bfloat16).float())


def test_equalizing_what_is_quantized_already_is_refused(applied_with):
    passes = (
        "[{quantize: {weights: none, roles: {experts: int8}}}, {quantize: {roles: {experts: none}, equalize: 0.5}}]"
    )
    message = refusal(lambda: applied_with(passes))
    assert "earlier pass" in message and "equalize" in message


def test_matrices_that_share_a_rotated_input_take_its_range_whichever_is_left_plain(applied_with):
    def scales(override: str, name: str) -> dict[str, float]:
        options = f"activations: static-int8, rotate: [attention_qkv], overrides: [{override}]"
        found = written_tensors(applied_with(f"[{{quantize: {{{options}}}}}]", name))
        return {
            key: tensor.item()
            for key, tensor in found.items()
            if key.endswith(("k_proj.input_scale", "v_proj.input_scale"))
        }

    kept = scales("{role: attention_qkv, projections: [q_proj], weights: none}", "kept")
    same = scales("{role: attention_qkv, projections: [q_proj], weights: int8}", "same")
    assert kept and kept == same


def test_a_calibration_text_that_changed_is_not_resumed_with(tmp_path, tiny, monkeypatch):
    text, recipe = tmp_path / "mine.txt", tmp_path / "recipe.yaml"
    text.write_text("A river ran past the mill. " * 40)
    options = "{method: gptq, weights: none, roles: {experts: int8}}"
    recipe.write_text(
        f"version: 1\ncalibration: {{prompts: [{text}], samples: 2, length: 32}}\npasses: [{{quantize: {options}}}]\n"
    )

    def job(**how):
        return pipeline.Job(load_recipe(str(recipe)), resolve(str(tiny)), tmp_path / "out", **how)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.writer, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pipeline.apply(job())
    text.write_text("The snow lay on the roofs of the town. " * 40)
    assert "calibration changed" in refusal(lambda: pipeline.apply(job(resume=True)))
    text.write_text("A river ran past the mill. " * 40)
    report = pipeline.apply(job(resume=True))
    assert report["passes"][0]["details"]["layers_reused"] == 8
    assert report["calibration"]["expert_coverage"]["experts_below_threshold"]  # noted before the interruption


def test_calibration_and_check_do_not_read_the_same_file_under_two_names(tmp_path, tiny):
    text, recipe = tmp_path / "mine.txt", tmp_path / "recipe.yaml"
    text.write_text("Once upon a time there was a mill. " * 20)
    recipe.write_text(
        "version: 1\ncalibration: {prompts: [./mine.txt]}\npasses: [{quantize: {method: gptq}}]\ncheck: {prompts: [mine.txt]}\n"
    )
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(tiny)), tmp_path / "out")
    assert "same text" in refusal(lambda: pipeline.prepare(job))
