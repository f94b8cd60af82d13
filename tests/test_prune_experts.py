"""`prune_experts` through the whole pipeline, on small random models: which experts stay and what is stored, against plain
float64 arithmetic on what transformers' model shows, and against checkpoints pruned by hand."""

import json
import re

import numpy as np
import pytest
import torch
from jamba_models import load_reference, make_jamba
from pruned_models import Pruning, expected_model, prune
from pruning_oracle import (
    EXPERTS,
    MOE_LAYERS,
    WINDOWS,
    Run,
    apply,
    assert_same_tensors,
    block_of,
    bytes_of,
    expert_of,
    gates_of,
    job_of,
    make_source,
    outputs_of,
    tensors_in,
)
from refusals import refusal
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment

from compress.apply import pipeline
from compress.passes.prune_experts import FEW_TOKENS
from compress.passes.pruning import reconstruction
from compress.runtime.artifacts import find_artifact, open_artifact

AGREEMENT = {"checkpoint": 1e-4, "onnx": 1e-3}  # the project's requirements, as in test_pruned_models.py
BFLOAT16 = 2.0**-8  # its rounding, at most half of this relative to the value
AS_CAME = {"router": "slice", "recovery": "none"}  # nothing is corrected
KEEP = 3
IDS = torch.randint(3, 67, (3, 71), generator=torch.Generator().manual_seed(7))
ENDS = [12, 13, 30, 70]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source) -> dict[str, torch.Tensor]:
    return tensors_in(source)


@pytest.fixture(scope="module")
def uniform(source, tmp_path_factory) -> Run:
    """The defaults, and an export."""
    return apply(source, tmp_path_factory.mktemp("uniform"), {"keep": KEEP}, export=True)


@pytest.fixture(scope="module")
def plain(source, tmp_path_factory) -> Run:
    return apply(source, tmp_path_factory.mktemp("plain"), {"keep": KEEP, **AS_CAME})


@pytest.fixture(scope="module")
def sliced_rows(source, tmp_path_factory) -> Run:
    return apply(source, tmp_path_factory.mktemp("rows"), {"keep": KEEP, "router": "keep_rows", "recovery": "none"})


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Experts of layer 4 that give next to nothing."""

    def quiet(tensors):
        for name, tensor in tensors.items():
            if name.startswith("model.layers.4.") and "down_proj" in name:
                tensor *= 0.02

    return change(make_source(tmp_path_factory.mktemp("uneven")), quiet)


@pytest.fixture(scope="module")
def budgeted(uneven, tmp_path_factory) -> Run:
    return apply(uneven, tmp_path_factory.mktemp("budget"), {"budget": 0.39})


def change(model, edit):
    """Edits the tensors of a one-file model in place."""
    tensors = tensors_in(model)
    edit(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def without_records(config: dict) -> dict:
    """config.json but for what passes say they did, which tests/test_records.py reads."""
    section = {key: value for key, value in config["compress"].items() if key != "passes"}
    return {key: value for key, value in config.items() if key != "compress"} | (
        {"compress": section} if section else {}
    )


# ---- what is stored


@pytest.mark.parametrize("rows_stay", [False, True], ids=["slice", "keep_rows"])
def test_without_corrections_the_checkpoint_is_the_one_pruned_by_hand_byte_for_byte(
    source, plain, sliced_rows, tmp_path, rows_stay
):
    found = sliced_rows if rows_stay else plain
    assert list(found.kept) == list(MOE_LAYERS) and all(len(kept) == KEEP for kept in found.kept.values())
    by_hand = prune(source, tmp_path / "by-hand", Pruning(found.kept, rows_stay=rows_stay))
    assert_same_tensors(found.stored, tensors_in(by_hand))
    config = without_records(found.config)
    assert config == json.loads((by_hand / "config.json").read_text())
    assert config["num_experts"] == KEEP
    assert config.get("compress") == ({"router_rows": EXPERTS} if rows_stay else None)


def test_corrections_change_nothing_but_the_down_projections(whole, uniform, source, tmp_path):
    by_hand = tensors_in(prune(source, tmp_path / "by-hand", Pruning(uniform.kept)))
    stored = uniform.stored
    assert stored.keys() == by_hand.keys()
    for name, tensor in by_hand.items():
        corrected = ".experts." in name and "down_proj" in name
        assert (bytes_of(stored[name]) != bytes_of(tensor)) == corrected, name
        assert stored[name].dtype == torch.bfloat16


def test_rows_that_stay_keep_the_gates_that_the_whole_model_has(source, sliced_rows):
    """The same model the plain way: transformers' whole model in which experts are left out, their rows are not."""
    expected = expected_model(source, Pruning(sliced_rows.kept, rows_stay=True))
    with torch.no_grad():
        logits = expected(IDS).logits[:, ENDS]
    assert (logits_of(sliced_rows.checkpoint) - logits).abs().max() < AGREEMENT["checkpoint"]


def logits_of(path) -> torch.Tensor:
    """After each of the tokens ENDS, by our own forward or ONNX Runtime, which are given the tokens piece by piece."""
    with torch.inference_mode():
        steps = open_artifact(find_artifact(path)).steps(len(IDS))
        return torch.stack([steps.step(part) for part in IDS.split((13, 1, 17, 40), dim=1)], 1)


def test_stock_transformers_and_the_graph_compute_the_same_as_our_forward(uniform):
    """The bounds are the project's requirements for one set of weights in three runtimes, all in float32."""
    with torch.no_grad():
        model = load_reference(uniform.checkpoint)
        expected = model(IDS).logits[:, ENDS]
    assert model.config.num_experts == KEEP
    for kind, path in (("checkpoint", uniform.checkpoint), ("onnx", uniform.out / "onnx")):
        assert (logits_of(path) - expected).abs().max() < AGREEMENT[kind], kind


# ---- which experts stay


def block_at(run: Run, whole: dict, layer: int):
    """The source's experts at the states that reach the layer in what was written: earlier layers are pruned there."""
    return block_of(load_reference(run.checkpoint), whole, layer, WINDOWS)


@pytest.mark.parametrize("method", ["frequency", "mean_gate", "ean", "reap"])
def test_a_score_keeps_the_experts_it_is_highest_for(source, whole, tmp_path, method):
    run = apply(source, tmp_path, {"keep": KEEP, "method": method})
    for layer in MOE_LAYERS:
        ranked = np.argsort(block_at(run, whole, layer)[0].score(method))[::-1]
        assert run.kept[layer] == tuple(sorted(ranked[:KEEP].tolist()))
    assert run.details["method"] == method


@pytest.mark.parametrize("router", ["slice", "rescale"])
@pytest.mark.parametrize("method", ["reconstruction", "merge"])
def test_others_keep_the_experts_without_whose_rest_the_layer_loses_least(source, whole, tmp_path, method, router):
    run = apply(source, tmp_path, {"keep": KEEP, "method": method, "router": router})
    for layer in MOE_LAYERS:
        assert run.kept[layer] == block_at(run, whole, layer)[0].best(KEEP, router)


def test_methods_do_not_all_choose_alike(tmp_path):
    """Else the tests above would tell them apart by nothing."""
    source = make_source(tmp_path / "source")
    block = block_of(load_reference(source), tensors_in(source), 1, WINDOWS)[0]
    chosen = {
        tuple(sorted(np.argsort(block.score(name))[::-1][:KEEP].tolist())) for name in ("frequency", "ean", "reap")
    }
    assert len(chosen | {block.best(KEEP, "rescale")}) > 1


@pytest.mark.parametrize("weights", ["frequency", "mean_gate"])
def test_merged_experts_are_the_average_of_their_groups(source, whole, tmp_path, weights):
    run = apply(source, tmp_path, {"keep": 2, "method": "merge", "merge_weights": weights, **AS_CAME})
    stored = run.stored
    for layer, entry in run.layers.items():
        block, _ = block_at(run, whole, layer)
        assert sorted(expert for group in entry["groups"] for expert in group) == list(range(EXPERTS))
        assert entry["groups"] == groups_of(block, entry["kept"])
        usage = block.score(weights)
        for position, group in enumerate(entry["groups"]):
            experts = [expert_of(whole, layer, expert) for expert in group]
            merged = averaged(experts, [usage[expert] for expert in group])
            for found, expected in zip(expert_of(stored, layer, position), merged, strict=True):
                np.testing.assert_allclose(found, expected, rtol=BFLOAT16, atol=1e-6)
    assert max(len(group) for entry in run.layers.values() for group in entry["groups"]) > 1


def groups_of(block, kept: list[int]) -> list[list[int]]:
    flat = (block.outputs * np.sqrt(block.importance)[:, None, None])[block.withheld].transpose(1, 0, 2)
    unit = flat.reshape(EXPERTS, -1) / np.linalg.norm(flat.reshape(EXPERTS, -1), axis=1)[:, None]
    groups = {expert: [expert] for expert in kept}
    for expert in set(range(EXPERTS)) - set(kept):
        groups[max(kept, key=lambda other: unit[expert] @ unit[other])].append(expert)
    return list(groups.values())


def averaged(experts: list[list[np.ndarray]], usage: list[float]) -> list[np.ndarray]:
    """gate, up, down: hidden units matched to the first expert's, then the weighted mean."""
    first, result = experts[0], [usage[0] * matrix for matrix in experts[0]]
    for expert, weight in zip(experts[1:], usage[1:], strict=True):
        cosine = sum(a @ b.T / np.linalg.norm(a) / np.linalg.norm(b)
                     for a, b in zip((*first[:2], first[2].T), (*expert[:2], expert[2].T), strict=True))  # fmt: skip
        order = linear_sum_assignment(-cosine)[1]
        for total, matrix in zip(result, (expert[0][order], expert[1][order], expert[2][:, order]), strict=True):
            total += weight * matrix
    return [matrix / sum(usage) for matrix in result]


# ---- how many


def planned_of(folder, block: dict, **changes):
    """The plan for a model of which there is only config.json."""
    config = json.loads((make_jamba(folder / "model", **changes) / "config.json").read_text())
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(config))
    return pipeline.prepare(job_of(folder / "config", folder, block), needs_weights=False)


@pytest.mark.parametrize(
    ("block", "removed"),
    [({"fraction": 0.29}, 58), ({"fraction": 0.299}, 58), ({"budget": 0.29}, 58), ({"budget": 0.585}, 117)],
    ids=str,
)
def test_a_share_is_the_number_as_it_is_written_rounded_down(tmp_path, block, removed):
    """0.29 x 100 is 28.999999999999996 in floating point."""
    planned = planned_of(tmp_path, block, num_experts=100, hidden_size=8, intermediate_size=4, num_attention_heads=2)
    experts = len(
        {re.sub(r"\.(gate|up|down)_proj.*", "", w.name) for w in planned.result.weights if ".experts." in w.name}
    )
    assert experts == 200 - removed


def test_a_budget_is_taken_where_it_costs_least(uneven, budgeted):
    """0.39 of 10 experts are three: layer 4 gives next to nothing, and layer 1 stays whole."""
    assert {layer: len(kept) for layer, kept in budgeted.kept.items()} == {1: 5, 4: 2}
    assert budgeted.config["num_experts"] == 5
    assert without_records(budgeted.config)["compress"] == {"num_experts_per_layer": [1, 5, 1, 1, 2, 1]}
    source, stored = tensors_in(uneven), budgeted.stored
    for name, tensor in source.items():
        if not name.startswith("model.layers.4.feed_forward."):
            assert bytes_of(stored[name]) == bytes_of(tensor), name
    assert budgeted.report["passes"][0]["details"]["experts_after"] == 7
    assert "loss" not in budgeted.layers[1] and "loss" in budgeted.layers[4]


@pytest.mark.parametrize("router", ["rescale", "keep_rows"])
def test_a_budget_is_shared_by_the_losses_of_the_layers_as_they_came(tmp_path, router):
    """Three MoE layers whose best sets, and the best way to share, are found by trying all."""
    source = make_source(tmp_path / "source", num_hidden_layers=5, expert_layer_period=2)
    change(source, lambda tensors: tensors["model.layers.3.feed_forward.router.weight"].mul_(4))
    run = apply(source, tmp_path / "run", {"budget": 0.5, "router": router, "recovery": "none"})
    whole, reference, ways = tensors_in(source), load_reference(source), {0: (0.0, ())}
    for layer in (1, 3):
        block, _ = block_of(reference, whole, layer, WINDOWS)
        losses = {5: 0.0} | {n: block.loss_of(block.best(n, router), router) for n in (2, 3, 4)}
        ways = {
            gone: min((loss + losses[5 - more], (*kept, 5 - more)) for less, (loss, kept) in ways.items()
                      for more in range(4) if less + more == gone)
            for gone in range(7) if any(less + more == gone for less in ways for more in range(4))
        }  # fmt: skip
    assert tuple(map(len, run.kept.values())) == ways[5][1]
    assert run.config["compress"].get("router_rows") == (5 if router == "keep_rows" else None)
    by_hand = prune(source, tmp_path / "by-hand", Pruning(run.kept, rows_stay=router == "keep_rows"))
    if router == "keep_rows":
        assert_same_tensors(run.stored, tensors_in(by_hand))
    assert without_records(run.config) == json.loads((by_hand / "config.json").read_text())


@pytest.mark.parametrize("block", [{"keep": 3}, {"budget": 0.39}, {"keep": 3, "router": "keep_rows"},
                                   {"budget": 0.39, "router": "keep_rows"}], ids=str)  # fmt: skip
def test_a_plan_predicts_the_stored_bytes_exactly(source, tmp_path, block):
    planned = pipeline.prepare(job_of(source, tmp_path / "plan", block, export=True))
    run = apply(source, tmp_path / "run", block, export=True)
    stored = sum(tensor.nbytes for tensor in run.stored.values())
    assert planned.checkpoint_bytes == stored
    artifacts = {artifact["kind"]: artifact for artifact in run.report["artifacts"]}
    assert artifacts["checkpoint"]["weight_bytes"] == stored
    # the graph keeps its matrices in float32 and folds some small tensors: 2 % is what a plan may be off
    assert planned.export_bytes()["onnx"] == pytest.approx(artifacts["onnx"]["weight_bytes"], rel=0.02)


# ---- what the report says


def test_the_losses_are_those_of_the_layer_as_it_is_stored(whole, uniform):
    stored, reference = uniform.stored, load_reference(uniform.checkpoint)
    for layer, entry in uniform.layers.items():
        block, x = block_of(reference, whole, layer, WINDOWS)
        kept, loss = entry["kept"], entry["loss"]
        left = block.left_of(kept, "slice")
        given = np.einsum(
            "te,teh->th",
            gates_of(block.logits, kept, 2)[:, kept],
            outputs_of(x, [expert_of(stored, layer, position) for position in range(KEEP)]),
        )
        # float32 through several layers; a token near a tie between two experts may go to the other
        assert loss["stored"] == pytest.approx(block.loss(given), rel=1e-2)
        assert loss["pruned"] == pytest.approx(block.loss(left), rel=1e-2)
        assert entry["scale"] == pytest.approx(block.factor(left, ~block.withheld), rel=1e-3)
        assert loss["rescaled"] == pytest.approx(block.loss(left * entry["scale"]), rel=1e-2)
        assert set(entry["recovered"]) <= set(range(KEEP))
    assert len({round(entry["scale"], 4) for entry in uniform.layers.values()}) == 2


def test_the_report_counts_experts_and_the_tokens_that_reached_them(whole, uniform):
    assert (uniform.details["experts_before"], uniform.details["experts_after"]) == (10, 6)
    expected = []
    for layer in MOE_LAYERS:
        block, _ = block_at(uniform, whole, layer)
        expected += [
            {"layer": layer, "expert": e, "tokens": int((block.gates[:, e] > 0).sum())} for e in range(EXPERTS)
        ]
        assert uniform.layers[layer]["dead"] == []
    assert uniform.details["experts"] == expected
    assert sum(entry["tokens"] for entry in expected) == 2 * 2 * 5 * 71
    coverage = uniform.report["calibration"]["expert_coverage"]
    assert coverage["min_tokens"] == min(entry["tokens"] for entry in expected)
    few = [f"layer {e['layer']} expert {e['expert']}" for e in expected if e["tokens"] < FEW_TOKENS]
    assert few, "these windows are short"
    assert coverage["experts_below_threshold"] == sorted(few)
    assert "judged on those" in coverage["below_threshold"]


def test_the_report_for_people_tells_of_every_layer(uniform, budgeted):
    text = (uniform.out / "report.md").read_text()
    assert "10 experts before, 6 after; router: rescale; recovery: least_squares." in text
    for layer, entry in uniform.layers.items():
        loss, kept = entry["loss"], ", ".join(map(str, entry["kept"]))
        assert (
            f"layer {layer} keeps {kept} of 5 experts; loss {loss['pruned']:.2g} without the others, "
            f"{loss['rescaled']:.2g} rescaled, {loss['stored']:.2g} as stored."
        ) in text
        assert set(entry["recovered"]) <= set(entry["kept"]), "numbered as before"
        assert f"Tokens of expert 0 to 4, as they were numbered: {', '.join(map(str, entry['tokens']))}." in text
    assert "layer 1 keeps all 5 experts." in (budgeted.out / "report.md").read_text()


def test_the_report_and_the_card_say_what_is_left_and_who_can_run_it(uniform, budgeted, sliced_rows):
    three, uneven = "6 of 10 experts stay: 3 of 5 in a layer.", "7 of 10 experts stay: 2 to 5 of 5 in a layer."
    for run, left in ((uniform, three), (budgeted, uneven), (sliced_rows, three)):
        notes, card = run.report["artifacts"][0]["notes"], (run.out / "checkpoint" / "README.md").read_text()
        assert notes[0] == left
        assert any("Stock runtimes stop" in note for note in notes) == (run is not uniform)
        assert all(note in card and note in (run.out / "report.md").read_text() for note in notes)
    kept = sum(tensor.numel() for tensor in uniform.stored.values())
    assert uniform.report["size"]["candidate_parameters"] == kept


@pytest.fixture(scope="module")
def with_a_dead_expert(tmp_path_factory):
    """The router of layer 1 gives u, -u, v, -v and 0: two of the first four are always above 0."""

    def edit(tensors):
        router = tensors["model.layers.1.feed_forward.router.weight"]
        router[1], router[3], router[4] = -router[0], -router[2], 0.0

    return change(make_source(tmp_path_factory.mktemp("dead")), edit)


@pytest.mark.parametrize("method", ["frequency", "mean_gate", "ean", "reap", "reconstruction"])
def test_an_expert_that_no_token_reaches_goes_first_and_is_named(with_a_dead_expert, tmp_path, method):
    run = apply(with_a_dead_expert, tmp_path, {"keep": 4, "method": method})
    assert run.layers[1]["dead"] == [4] and run.layers[1]["tokens"][4] == 0
    assert run.kept[1] == (0, 1, 2, 3)
    assert "No calibration token reached 4." in (run.out / "report.md").read_text()
    assert run.report["calibration"]["expert_coverage"]["min_tokens"] == 0
    assert all(torch.isfinite(tensor.float()).all() for tensor in run.stored.values())


def test_nothing_of_the_work_is_left_in_the_output(uniform, budgeted):
    for run in (uniform, budgeted):
        assert {path.name for path in run.out.iterdir()} <= {
            *("checkpoint", "onnx", "manifest.json", "recipe.yaml", "recipe.resolved.yaml"),
            *("report.json", "report.md", "report.html", "junit.xml"),
        }
        assert not [path for path in run.out.rglob("*") if path.suffix in (".f32", ".tmp") or "note-" in path.name]
        assert not run.out.with_name("out.partial").exists()


def test_the_same_recipe_and_seed_give_the_same_bytes(source, uneven, uniform, budgeted, tmp_path):
    assert apply(source, tmp_path / "uniform", {"keep": KEEP}, export=True).digests == uniform.digests
    assert apply(uneven, tmp_path / "budget", {"budget": 0.39}).digests == budgeted.digests


# ---- models that overflow


def test_experts_that_overflow_on_calibration_tokens_are_refused_with_the_name_of_their_layer(tmp_path):
    def edit(tensors):
        tensors["model.layers.4.feed_forward.experts.2.up_proj.weight"][:] = 3e38

    model = change(make_source(tmp_path / "model", torch.float32), edit)
    for block in ({"keep": KEEP}, {"budget": 0.3}):
        message = refusal(lambda block=block: apply(model, tmp_path / "run", block))
        assert "layer 4" in message and "calibration" in message
        assert not list((tmp_path / "run").glob("out*"))


def test_calibration_too_small_to_withhold_any_is_refused(source, tmp_path):
    few = [window[:53] for window in WINDOWS[:3]]
    message = refusal(lambda: apply(source, tmp_path, {"keep": KEEP}, windows=few))
    assert "calibration" in message and "159 tokens" in message
    assert not list(tmp_path.glob("out*"))


def test_a_second_pass_prunes_what_the_first_one_left(source, uniform, tmp_path):
    """In the first layer with experts, where both ways the same states arrive, as by pruning twice."""
    at_once = apply(source, tmp_path / "at-once", {"keep": KEEP}, {"keep": 2})
    one_by_one = apply(uniform.out / "checkpoint", tmp_path / "one-by-one", {"keep": 2})
    prefix = f"model.layers.{MOE_LAYERS[0]}."
    found, expected = (
        {name: tensor for name, tensor in tensors_in(run.out / "checkpoint").items() if name.startswith(prefix)}
        for run in (at_once, one_by_one)
    )
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("router", ["slice", "rescale", "keep_rows"])
def test_a_budget_is_shared_by_the_losses_under_the_recipe_s_router(source, tmp_path, monkeypatch, router):
    """The ways seldom share differently, so what is asked for is looked at."""
    asked, real = set(), reconstruction.Reconstruction.__init__

    def recorded(self, statistics, router):
        asked.add(router)
        real(self, statistics, router)

    monkeypatch.setattr(reconstruction.Reconstruction, "__init__", recorded)
    apply(source, tmp_path / "run", {"budget": 0.3, "router": router, "method": "frequency", "recovery": "none"})
    assert asked == {router}
