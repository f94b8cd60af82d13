"""Pruning where gates are sigmoids made to sum to one, beside a shared expert and in a smaller space: what calibration tells of
such a layer, what is chosen and what is stored, against float64 numpy on what transformers' Nemotron-H shows; and whole runs."""

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nemotron_h_models import load_reference, make_nemotron_h
from pruning_oracle import Run, apply, assert_same_tensors, job_of, tensors_in, withheld_of
from refusals import refusal
from safetensors.torch import load_file, save_file

import compress
from compress.apply import pipeline
from compress.apply.plan import describe
from compress.calibration.inputs import LayerInputs
from compress.checkpoint.reader import Checkpoint
from compress.model.tensor_names import written_out
from compress.passes.pruning import prune as layer
from compress.passes.pruning import scores, statistics
from compress.passes.pruning.statistics import Statistics, collect
from compress.runtime.inference import HiddenStates

LENGTHS = (197, 197, 131)
SHAPES = {
    "shared": {"num_experts_per_tok": 2},
    "one a token, not renormalised": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "latent": {"moe_latent_size": 20},
    "latent, biases": {"moe_latent_size": 20, "mlp_bias": True, "num_experts_per_tok": 3},
}
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # float32 through a whole layer, of values near 1


@dataclass
class Layer:
    """Layer 1 in float64: x [T, H] is what its mixer sees, hidden [T, H] what that is added to."""

    tensors: dict[str, np.ndarray]
    config: SimpleNamespace
    x: np.ndarray
    hidden: np.ndarray
    withheld: np.ndarray

    def get(self, name: str, default: float | None = None):
        return self.tensors.get(f"backbone.layers.1.mixer.{name}", default)

    def gates(self, kept) -> np.ndarray:
        """[T, len(kept)]"""
        kept, top_k = list(kept), self.config.num_experts_per_tok
        sigmoids = 1 / (1 + np.exp(-(self.x @ self.get("gate.weight")[kept].T)))
        result = np.zeros_like(sigmoids)
        for token, row in enumerate(sigmoids):
            chosen = np.argsort(-(row + self.get("gate.e_score_correction_bias")[kept]))[:top_k]
            whole = row[chosen].sum() if self.config.norm_topk_prob else 1.0
            result[token, chosen] = self.config.routed_scaling_factor * row[chosen] / whole
        return result

    @cached_property
    def seen(self) -> np.ndarray:
        if not self.config.moe_latent_size:
            return self.x
        return self.x @ self.get("fc1_latent_proj.weight").T + self.get("fc1_latent_proj.bias", 0.0)

    def expert(self, number: int) -> np.ndarray:
        """[T, K]: in the experts' space."""
        inner = np.maximum(self.seen @ self.get(f"experts.{number}.up_proj.weight").T, 0) ** 2
        return inner @ self.get(f"experts.{number}.down_proj.weight").T

    def output(self, summed: np.ndarray) -> np.ndarray:
        return summed @ self.get("fc2_latent_proj.weight").T if self.config.moe_latent_size else summed

    @cached_property
    def outputs(self) -> np.ndarray:
        """[T, E, H]"""
        return self.output(np.stack([self.expert(e) for e in range(self.config.n_routed_experts)], 1))

    @cached_property
    def beside(self) -> np.ndarray:
        inner = self.x @ self.get("shared_experts.up_proj.weight").T + self.get("shared_experts.up_proj.bias", 0.0)
        shared = np.maximum(inner, 0) ** 2 @ self.get("shared_experts.down_proj.weight").T
        return shared + self.get("shared_experts.down_proj.bias", 0.0) + self.get("fc2_latent_proj.bias", 0.0)

    def given(self, kept) -> np.ndarray:
        return np.einsum("te,teh->th", self.gates(kept), self.outputs[:, list(kept)])

    @cached_property
    def whole(self) -> np.ndarray:
        return self.given(range(self.config.n_routed_experts))

    @cached_property
    def importance(self) -> np.ndarray:
        return 1 / np.square(self.hidden + self.whole + self.beside).sum(1)

    def loss(self, given: np.ndarray) -> float:
        return float((np.square(self.whole - given).sum(1) * self.importance)[self.withheld].mean())

    def factor(self, given: np.ndarray, tokens: np.ndarray) -> float:
        root = np.sqrt(self.importance[tokens])[:, None]
        columns, wanted = (given[tokens] * root).reshape(-1, 1), (self.whole[tokens] * root).ravel()
        return float(np.linalg.lstsq(columns, wanted, rcond=None)[0][0])


@pytest.fixture(scope="module", params=SHAPES)
def moe(request, tmp_path_factory):
    """A float32 model's layer 1, with what reaches it in transformers' model."""
    folder = tmp_path_factory.mktemp("moe")
    source = make_nemotron_h(folder / "model", torch.float32, layers_block_type="ME*", **SHAPES[request.param])
    windows = [torch.randint(3, 67, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    reference, seen = load_reference(source), {"hidden": [], "x": [], "given": []}
    block = reference.model.layers[1]
    block.register_forward_pre_hook(lambda _, arguments: seen["hidden"].append(arguments[0].detach()))
    block.mixer.register_forward_pre_hook(lambda _, arguments: seen["x"].append(arguments[0].detach()))
    block.mixer.register_forward_hook(lambda _, arguments, output: seen["given"].append(output.detach()))
    with torch.no_grad():
        for window in windows:
            reference(window[None], use_cache=False)
    states = HiddenStates(folder, windows, 40, tokens=400).at(folder / "states")
    for number, members in enumerate(states.blocks):
        states.write(number, torch.cat([seen["hidden"][i] for i in members]))
    flat = {name: torch.cat([part.flatten(0, 1) for part in parts]).double().numpy() for name, parts in seen.items()}
    tensors = {name: tensor.double().numpy() for name, tensor in tensors_in(source).items()}
    truth = Layer(tensors, reference.config, flat["x"], flat["hidden"], withheld_of(windows))
    np.testing.assert_allclose(truth.whole + truth.beside, flat["given"], **CLOSE)
    model, numbers = Checkpoint(source).model, iter(range(100))

    def inputs() -> LayerInputs:
        return LayerInputs(model, 1, states, folder / f"layer-{next(numbers)}", lambda weight: weight, "cpu")

    return SimpleNamespace(inputs=inputs, unit=model.unit("layer.1"), truth=truth)


@torch.inference_mode()
def collected(moe) -> tuple[Statistics, LayerInputs]:
    inputs = moe.inputs()
    return collect(moe.unit, inputs), inputs


def test_what_is_collected_is_what_the_layer_gives_after_its_projection(moe):
    (found, inputs), truth = collected(moe), moe.truth
    gates, chosen = truth.gates(range(6)), truth.outputs[truth.withheld]
    np.testing.assert_allclose(found.gates, gates, **CLOSE)
    np.testing.assert_allclose(found.norms, np.linalg.norm(truth.outputs, axis=2) * (gates > 0), **CLOSE)
    np.testing.assert_allclose(found.importance, truth.importance, rtol=1e-3)
    np.testing.assert_allclose(found.gram, np.einsum("neh,ndh->ned", chosen, chosen), rtol=1e-3, atol=1e-3)
    target = inputs.scratch(statistics.TARGET).of_width(truth.seen.shape[1])
    written = torch.cat([target.read(number).flatten(0, 1) for number in range(len(target))])
    np.testing.assert_allclose(truth.output(written.double().numpy()), truth.whole, **CLOSE)


@pytest.mark.parametrize("name", scores.NAMES)
def test_scores_are_those_of_what_reaches_the_residual_stream(moe, name):
    (found, _), truth = collected(moe), moe.truth
    gates = truth.gates(range(6))[~truth.withheld]
    norms, routed = np.linalg.norm(truth.outputs, axis=2)[~truth.withheld], gates > 0
    expected = {
        "frequency": routed.mean(0),
        "mean_gate": gates.mean(0),
        "ean": (norms * routed).sum(0),
        "reap": (gates * norms).sum(0) / np.maximum(1, routed.sum(0)),
    }[name]
    np.testing.assert_allclose(scores.of(name, found), expected, rtol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize(("router", "recovery"), [("slice", "none"), ("rescale", "none"), ("rescale", "least_squares")])
def test_the_set_of_least_loss_stays_and_losses_are_those_of_what_is_stored(moe, router, recovery):
    options = SimpleNamespace(method="reconstruction", router=router, recovery=recovery, damping=3.0)
    (unit, entry), truth = layer.prune(options, moe.unit, moe.inputs(), 4), moe.truth
    kept, loss = tuple(entry["kept"]), entry["loss"]

    def loss_of(sets) -> float:
        given = truth.given(sets)
        return truth.loss(given * (truth.factor(given, truth.withheld) if router == "rescale" else 1))

    assert kept == min(combinations(range(6), 4), key=loss_of)
    given = truth.given(kept)
    assert loss["pruned"] == pytest.approx(truth.loss(given), rel=1e-3)
    if router == "rescale":
        factor = truth.factor(given, ~truth.withheld)
        helps = truth.loss(given * factor) < truth.loss(given)
        assert entry["scale"] == pytest.approx(factor if helps else 1.0, rel=1e-3)
    stored = {name: weight.dense().double().numpy() for name, weight in unit.weights.items()}
    config = SimpleNamespace(**{**vars(truth.config), **truth.config.to_dict(), "n_routed_experts": 4})
    after = Layer(stored, config, truth.x, truth.hidden, truth.withheld)
    assert loss["stored"] == pytest.approx(truth.loss(after.whole), rel=2e-3)
    assert loss["stored"] <= loss["pruned"] * (1 + 1e-6)
    assert (recovery == "none") == ("recovered" not in entry)


# ---- whole runs

PLAIN = {"router": "slice", "recovery": "none"}
IDS = torch.randint(3, 67, (2, 40), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module", params=["shared", "latent, biases"])
def source(request, tmp_path_factory) -> Path:
    folder = make_nemotron_h(tmp_path_factory.mktemp("source"), **SHAPES[request.param])
    config = json.loads(
        (folder / "config.json").read_text()
    )  # a key that wins over n_routed_experts, in transformers too
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 6}))
    return folder


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> Run:
    return apply(source, tmp_path_factory.mktemp("plain"), {"keep": 4, **PLAIN})


def of_kind(run: Run, kind: str) -> list[dict]:
    """What config.json says was done to tensors."""
    return [change for change in run.config["compress"]["passes"][0]["changes"] if change["kind"] == kind]


def by_hand(source: Path, kept: dict[int, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    tensors = load_file(source / "model.safetensors")
    for layer_index, experts in kept.items():
        stem = f"backbone.layers.{layer_index}.mixer."
        for name in ("gate.weight", "gate.e_score_correction_bias"):
            tensors[stem + name] = tensors[stem + name][list(experts)]
        own = {name: tensors.pop(name) for name in list(tensors) if name.startswith(f"{stem}experts.")}
        for new, old in enumerate(experts):
            for part in ("up_proj.weight", "down_proj.weight"):
                tensors[f"{stem}experts.{new}.{part}"] = own[f"{stem}experts.{old}.{part}"]
    return tensors


def test_what_is_stored_is_the_model_pruned_by_hand_and_every_key_says_how_many_stay(source, plain):
    assert list(plain.kept) == [1, 5]
    assert_same_tensors(plain.stored, by_hand(source, plain.kept))
    by_layer = {change["stem"]: change["sources"] for change in of_kind(plain, "kept")}
    assert by_layer == {f"backbone.layers.{i}.mixer.experts.": list(kept) for i, kept in plain.kept.items()}
    named = {
        name: tuple(change["rows"]) for change in of_kind(plain, "rows") for name in written_out(change["tensors"])
    }
    for i, kept in plain.kept.items():
        stem = f"backbone.layers.{i}.mixer.gate."
        assert named[f"{stem}weight"] == named[f"{stem}e_score_correction_bias"] == kept
    assert (plain.config["n_routed_experts"], plain.config["num_local_experts"]) == (4, 4)
    assert plain.config["compress"].keys() == {"passes"}


def test_stock_transformers_and_compress_load_run_it_as_we_do(plain):
    ours = load_reference(plain.checkpoint)(IDS, use_cache=False).logits
    assert (compress.load(plain.checkpoint)(IDS, use_cache=False).logits - ours).abs().max() < 1e-4
    assert plain.report["runtimes"][0]["loads"]


@pytest.mark.parametrize(
    "block",
    [{"keep": 4, "method": "merge", "merge_weights": "mean_gate"}, {"keep": 4, "method": "reap"}, {"keep": 5}],
    ids=str,
)
def test_every_way_gives_a_model_that_stock_transformers_loads(source, tmp_path, block):
    run = apply(source, tmp_path / "run", block)
    model = load_reference(run.checkpoint)
    assert model.config.n_routed_experts == block["keep"]
    assert model(IDS, use_cache=False).logits.isfinite().all()


def quiet(source: Path, folder: Path) -> Path:
    """Experts of layer 5 that give next to nothing: a budget takes them there."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("backbone.layers.5.") and ".experts." in name and "down_proj" in name:
            tensor *= 0.02
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder


def test_layers_that_differ_run_here_and_in_what_is_loaded_and_stop_stock_transformers(source, tmp_path):
    run = apply(quiet(source, tmp_path / "quiet"), tmp_path / "run", {"budget": 0.26, **PLAIN})
    counts = {layer: len(kept) for layer, kept in run.kept.items()}
    assert counts == {1: 6, 5: 3}
    assert run.config["compress"]["num_experts_per_layer"] == [1, 6, 1, 1, 1, 3, 1, 1]
    assert run.config["n_routed_experts"] == 6
    model = Checkpoint(run.checkpoint).model
    assert [layer.num_experts for layer in model.layers] == [1, 6, 1, 1, 1, 3, 1, 1]
    assert compress.load(run.checkpoint)(IDS, use_cache=False).logits.isfinite().all()
    assert not run.report["runtimes"][0]["loads"]
    with pytest.raises(RuntimeError, match=r"size|shape"):
        load_reference(run.checkpoint)


def test_rows_of_removed_experts_are_refused_where_they_mean_nothing(source, tmp_path):
    job = job_of(source, tmp_path / "run", {"keep": 4, "router": "keep_rows"})
    assert "rows of removed experts would change nothing" in refusal(lambda: pipeline.prepare(job))


def test_groups_of_experts_are_refused(tmp_path):
    grouped = make_nemotron_h(tmp_path / "model", n_group=3, topk_group=2)
    job = job_of(grouped, tmp_path / "run", {"keep": 4})
    assert "groups of equal size" in refusal(lambda: pipeline.prepare(job))


def test_the_plan_and_the_report_say_what_a_factor_means_where_gates_do_not_grow(source, plain, tmp_path):
    planned = pipeline.prepare(job_of(source, tmp_path / "run", {"keep": 4}))
    [note] = [line for line in describe(planned, tmp_path / "out").splitlines() if line.startswith("note")]
    assert "a token's gates sum to the same" in note and "none grows" in note
    assert "notes" not in plain.details
