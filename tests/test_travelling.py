"""Tensors that travel with a model and that nothing here runs: kept byte for byte and named, or left out."""

import json
from pathlib import Path

import pytest
import torch
from nemotron_h_models import add_mtp, load_reference, make_nemotron_h
from pruning_oracle import Run, apply, assert_same_tensors, job_of
from refusals import refusal

import compress
from compress.apply import pipeline
from compress.apply.plan import describe

IDS = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))
INT8 = {"quantize": {"weights": "int8"}}
PRUNED = {"keep": 4}
LEFT_OUT = {"leave_out": {"roles": ["mtp"]}}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_nemotron_h(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def added(source) -> dict[str, torch.Tensor]:
    return add_mtp(source)


def travelled(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in run.stored.items() if name.startswith("mtp.")}


@pytest.mark.parametrize("steps", [(INT8,), (PRUNED,), (PRUNED, INT8)], ids=["quantized", "pruned", "both"])
def test_they_come_out_as_they_went_in_and_are_named(source, added, tmp_path, steps):
    run = apply(source, tmp_path / "run", *steps)
    assert_same_tensors(travelled(run), added)
    assert run.config["num_nextn_predict_layers"] == 1
    [note] = [note for note in run.report["artifacts"][0]["notes"] if "travel" in note]
    assert note.startswith("5 tensors")
    assert all(name in note for name in added)
    assert note in (run.out / "report.md").read_text().replace("\\", "")


def test_what_has_them_runs_and_is_loaded_as_without_them(source, added, tmp_path):
    run = apply(source, tmp_path / "run", INT8)
    bare = apply(source, tmp_path / "bare", LEFT_OUT, INT8)
    for load in (compress.load, load_reference):
        logits = [load(folder)(IDS).logits for folder in (run.checkpoint, bare.checkpoint)]
        assert torch.equal(*logits)


@pytest.mark.parametrize("steps", [(LEFT_OUT, PRUNED), (PRUNED, LEFT_OUT), ({"budget": 0.25}, LEFT_OUT)])
def test_a_recipe_leaves_them_out(source, added, tmp_path, steps):
    pruning = next(step for step in steps if step != LEFT_OUT)
    run, kept = apply(source, tmp_path / "run", *steps), apply(source, tmp_path / "kept", pruning)
    assert_same_tensors(run.stored, {name: tensor for name, tensor in kept.stored.items() if name not in added})
    assert run.config["num_nextn_predict_layers"] == 0
    assert run.config["compress"]["passes"][steps.index(LEFT_OUT)] == {"name": "leave_out", "changes": []}
    assert run.report["passes"][steps.index(LEFT_OUT)]["details"]["notes"] == [
        "5 tensors of 'mtp' are left out, 6,606 parameters"
    ]
    assert not any("travel" in note for note in run.report["artifacts"][0].get("notes", []))


def test_the_plan_says_what_travels_and_what_is_left_out(source, added, tmp_path):
    plans = [pipeline.prepare(job_of(source, tmp_path / name, *steps)) for name, steps in
             (("kept", [INT8]), ("bare", [LEFT_OUT, INT8]))]  # fmt: skip
    kept, bare = (describe(planned, tmp_path / "out") for planned in plans)
    assert "travels   5 tensors that nothing here runs" in kept
    assert "note      leave_out: 5 tensors of 'mtp' are left out" in bare
    assert "travels" not in bare
    assert plans[0].checkpoint_bytes - plans[1].checkpoint_bytes == sum(tensor.nbytes for tensor in added.values())


def test_a_model_without_them_is_told_so(small, tmp_path):
    run = apply(small, tmp_path / "run", LEFT_OUT)
    assert run.details["notes"] == ["this model has no tensors of 'mtp'"]


def test_what_a_model_computes_with_is_not_left_out(source, tmp_path):
    message = refusal(lambda: job_of(source, tmp_path / "run", {"leave_out": {"roles": ["router"]}}))
    assert "passes.0.leave_out.roles: 'router' is part of what a model computes; expected: mtp" in message


def test_inspect_lists_them(source, added, compress_cli):
    facts = json.loads(compress_cli("inspect", source, "--json").stdout)
    assert facts["travelling"] == sorted(added)
    assert facts["roles"]["mtp"] == 6606
    text = compress_cli("inspect", source).stdout
    assert all(name in text for name in added)
    left = {name: count for name, count in facts["roles"].items() if name not in ("mtp", "experts")}
    assert facts["active_parameters"] == sum(left.values()) + facts["roles"]["experts"] * 2 // 6
