"""Checkpoints with fewer experts: layers may have different numbers of them, and routers may keep the rows of removed ones.

Our forward, the ONNX graph and `compress.load` compute what transformers' whole model computes where a plain block leaves
those experts out; stock transformers does too, or stops.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx
import pytest
import torch
from jamba_models import make_jamba
from onnx_graphs import all_graphs
from pruned_models import Pruning, expected_model, prune
from refusals import refusal
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, JambaForCausalLM

import compress
from compress.apply import exporting, pipeline
from compress.checkpoint.reader import Checkpoint
from compress.model.expert_counts import pruned
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.artifacts import find_artifact, open_artifact
from compress.runtime.onnx_session import OnnxSession
from compress.studies.inspection import as_text, inspect

AGREEMENT = {
    "checkpoint": 1e-4,
    "onnx": 1e-3,
}  # the project's requirements, as in test_jamba_forward and test_onnx_export
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}  # fused int8 products in float32, as our own forward has them
SPREAD = 0.7  # see test_jamba_forward.py: keeps the noise of float32 itself far below the bounds
EXPERTS = 5  # of the whole model, in layers 1 and 4
LENGTHS = (71, 71, 37)  # of windows: primes, so no chunk of the scan is full
IDS = torch.randint(3, 67, (3, 71), generator=torch.Generator().manual_seed(7))

EVERY_LAYER = {"expert_layer_period": 1, "expert_layer_offset": 0}
ALL = tuple(range(EXPERTS))
# name: changes to the shapes of jamba_models.py, and what is pruned; orders that are not ascending show mixed-up numbers
CASES = {
    "the same number": ({}, Pruning({1: (0, 2, 3), 4: (4, 1, 2)})),
    "the same number, rows stay": ({}, Pruning({1: (0, 2, 3), 4: (4, 1, 2)}, rows_stay=True)),
    "different numbers": ({}, Pruning({1: (4, 0, 2, 3), 4: (3, 1)})),
    "different numbers, rows stay": ({}, Pruning({1: (4, 0, 2, 3), 4: (3, 1)}, rows_stay=True)),
    "one layer only": ({}, Pruning({1: (3, 4, 1), 4: ALL})),
    "one layer only, rows stay": ({}, Pruning({1: (3, 4, 1), 4: ALL}, rows_stay=True)),
    "one expert a token, rows stay": (
        {"num_experts_per_tok": 1}, Pruning({1: (3, 1), 4: (0, 4, 2)}, rows_stay=True)),
    "experts in every layer": (
        EVERY_LAYER, Pruning({0: (1, 0), 1: ALL, 2: (2, 3, 4), 3: (0, 4), 4: (4, 3, 2, 1), 5: (2, 0)})),
    "experts in every layer, rows stay": (
        EVERY_LAYER, Pruning({0: (1, 0), 1: ALL, 2: (2, 3, 4), 3: (0, 4), 4: (4, 3, 2, 1), 5: (2, 0)}, rows_stay=True)),
}  # fmt: skip
STOCK = ["the same number"]  # what stock transformers can load


@dataclass
class Case:
    """A pruned checkpoint, its export, and what must come of it; `expected` is transformers' whole model, pruned."""

    folder: Path
    pruning: Pruning
    expected: JambaForCausalLM

    @cached_property
    def logits(self) -> torch.Tensor:
        return logits_of(self.expected)

    @cached_property
    def onnx(self) -> Path:
        return exporting.export_checkpoint(self.folder, "onnx", self.folder.parent / "onnx")

    def artifact(self, kind: str):
        return open_artifact(find_artifact(self.folder if kind == "checkpoint" else self.onnx))


@torch.inference_mode()
def logits_of(model: JambaForCausalLM) -> torch.Tensor:
    return model(IDS).logits


def make_case(root: Path, name: str) -> Case:
    changes, pruning = CASES[name]
    source = make_jamba(root / "source", spread=SPREAD, num_experts=EXPERTS, **changes)
    return Case(prune(source, root / "pruned", pruning), pruning, expected_model(source, pruning))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(name: str) -> Case:
        if name not in made:
            made[name] = make_case(tmp_path_factory.mktemp("case"), name)
        return made[name]

    return case


@pytest.fixture(scope="module", params=CASES)
def case(request, cases) -> Case:
    return cases(request.param)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, most: float):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= most


# ---- numbers


def test_the_expected_logits_tell_every_pruning_from_the_others(cases):
    """By a hundred times what ours may be off: a test that passes for the wrong experts or denominator shows nothing."""
    names = [name for name, (changes, _) in CASES.items() if not changes]
    for first, second in ((a, b) for a in names for b in names if a < b):
        assert (cases(first).logits - cases(second).logits).abs().max() > 100 * AGREEMENT["onnx"], (first, second)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", AGREEMENT)
def test_windows_give_the_expected_logits(case, kind, phase):
    windows, seen = [ids[:length] for ids, length in zip(IDS, LENGTHS, strict=True)], 0
    for window, start, logits in case.artifact(kind).candidate().logits(windows, phase, lambda _: None):
        assert_close(logits, case.logits[window, start : start + len(logits)], AGREEMENT[kind])
        seen += len(logits)
    assert seen == sum(LENGTHS) - len(LENGTHS)  # the last token's logits predict nothing in the window


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", AGREEMENT)
def test_prefill_in_pieces_and_single_tokens_give_the_expected_logits(case, kind, batch):
    steps, seen = case.artifact(kind).steps(batch), 0
    for size in (1, 31, 1, 5, 1, 1):
        logits = steps.step(IDS[:batch, seen : seen + size])
        seen += size
        assert_close(logits, case.logits[:batch, seen - 1], AGREEMENT[kind])


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_what_is_loaded_gives_the_expected_logits_in_each_of_transformers_ways(case, experts):
    model = compress.load(case.folder)
    model.set_experts_implementation(experts)
    blocks = [model.model.layers[index].feed_forward for index in case.pruning.kept]
    assert all(block.experts.config._experts_implementation == experts for block in blocks)
    assert_close(logits_of(model), case.logits, AGREEMENT["checkpoint"])


def test_generate_goes_on_with_the_expected_tokens(case):
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    ids = compress.load(case.folder).generate(IDS, **options)
    assert ids.shape == (3, 80) and torch.equal(ids, case.expected.generate(IDS, **options))


# ---- compress.load


def test_another_dtype_is_that_of_every_parameter(case):
    """The checkpoint is in bfloat16: nothing is lost."""
    exact = dict(compress.load(case.folder).named_parameters())
    for name, parameter in compress.load(case.folder, dtype=torch.bfloat16).named_parameters():
        assert parameter.dtype == torch.bfloat16 and torch.equal(parameter.float(), exact[name]), name


def test_what_was_loaded_can_be_saved_and_read_again(case, tmp_path):
    compress.load(case.folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    expected = {weight.name: weight.dense() for weight in Checkpoint(case.folder).model.weights}
    for weight in Checkpoint(tmp_path).model.weights:
        assert torch.equal(weight.dense(), expected[weight.name]), weight.name
    assert_close(logits_of(compress.load(tmp_path)), case.logits, AGREEMENT["checkpoint"])


# ---- stock transformers


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_agrees_or_stops(cases, name):
    def load():
        return AutoModelForCausalLM.from_pretrained(cases(name).folder, dtype=torch.float32).eval()

    if name in STOCK:
        assert load().config.num_experts == 3
        assert_close(logits_of(load()), cases(name).logits, AGREEMENT["checkpoint"])
        return
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        load()


# ---- quantized


@pytest.fixture(scope="module", params=["the same number", "different numbers", "different numbers, rows stay"])
def quantized(request, cases, tmp_path_factory) -> tuple[str, Path]:
    """The quick start's recipe over a pruned checkpoint: the output has checkpoint/ and onnx/."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    recipe = load_recipe("tiny-int8", ("check=null",))
    pipeline.apply(pipeline.Job(recipe, resolve(str(cases(request.param).folder)), out))
    return request.param, out


def test_a_quantized_one_is_computed_alike_by_all(quantized):
    """In int8, so not what the whole model gives: the artifacts are held against what `compress.load` computes."""
    expected = logits_of(compress.load(quantized[1]))[:, 70 - 1]
    checkpoint = open_artifact(quantized[1] / "checkpoint").steps(3).step(IDS[:, :70])
    assert_close(checkpoint, expected, AGREEMENT["checkpoint"])
    graph = OnnxSession(quantized[1] / "onnx" / "model.onnx", EXACT, threads=1).start(3)
    assert_close(torch.from_numpy(graph.step(IDS[:, :70].numpy()))[:, -1], expected, AGREEMENT["onnx"])


def test_stock_transformers_reads_a_quantized_one_alike_or_stops(quantized):
    name, out = quantized

    def load():
        return AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32).eval()

    if name in STOCK:
        assert_close(logits_of(load()), logits_of(compress.load(out)), AGREEMENT["checkpoint"])
        return
    with pytest.raises((RuntimeError, ValueError), match="ignore_mismatched_sizes"):
        load()


# ---- the graph


def nodes(folder: Path) -> list[str]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [node.op_type for each in all_graphs(graph) for node in each.node]


@pytest.mark.parametrize(
    ("name", "more"),
    [("the same number, rows stay", 2), ("one layer only, rows stay", 1), ("different numbers", 0)],
)
def test_only_routers_with_rows_of_removed_experts_are_cut(cases, name, more):
    """Slices also cut the convolution's state: they are counted against the graph of a model without such rows."""
    plain = nodes(cases("the same number").onnx).count("Slice")
    assert nodes(cases(name).onnx).count("Slice") - plain == more


def test_the_onnx_checker_accepts_the_graph_with_its_shapes(case):
    onnx.checker.check_model(case.onnx / "model.onnx", full_check=True)


# ---- inspect


def expected_layers(case: Case) -> list[dict]:
    """Numbers of experts, and rows where a router has more of them."""
    layers = []
    for index in range(6):
        experts = case.pruning.counts.get(index, 1)
        rows = case.pruning.rows_stay and index in case.pruning.kept and experts < EXPERTS
        layers.append({"experts": experts} | ({"router_rows": EXPERTS} if rows else {}))
    return layers


@pytest.mark.parametrize("kind", AGREEMENT)
def test_inspect_counts_what_is_there(case, kind):
    facts = inspect(str(case.folder if kind == "checkpoint" else case.onnx))
    expert, top_k = 3 * 40 * 56, case.expected.config.num_experts_per_tok
    parameters = sum(math.prod(t.shape) for t in load_file(case.folder / "model.safetensors").values())
    assert facts["parameters"] == parameters
    assert facts["active_parameters"] == parameters - expert * sum(n - top_k for n in case.pruning.counts.values())
    assert facts["weight_bytes"] == 2 * parameters
    assert facts["experts"] == {"total": max(case.pruning.counts.values()), "active": top_k}
    assert [{k: v for k, v in layer.items() if k not in ("index", "kind")} for layer in facts["layers"]] == (
        expected_layers(case)
    )


@pytest.mark.parametrize(
    ("name", "shown"), [("the same number", "3, 2 active"), ("different numbers", "2 to 4, 2 active"),
                        ("one expert a token, rows stay", "2 to 3, 1 active")])  # fmt: skip
def test_the_text_of_inspect_shows_the_range_of_experts(cases, name, shown):
    lines = as_text(inspect(str(cases(name).folder))).splitlines()
    assert f"experts                {shown}" in lines


# ---- config.json


def test_a_uniform_pruning_needs_no_section(cases):
    assert "compress" not in json.loads((cases("the same number").folder / "config.json").read_text())


def test_a_section_that_was_there_is_replaced():
    values = {"num_experts": 8, "hidden_size": 40, "compress": {"num_experts_per_layer": [1, 8], "router_rows": 8}}
    assert pruned(values, ("num_experts",), {1: 3}, 2, None) == {"num_experts": 3, "hidden_size": 40}
    assert pruned(values, ("num_experts",), {0: 2, 1: 3}, 4, 8)["compress"] == {
        "num_experts_per_layer": [2, 3, 1, 1],
        "router_rows": 8,
    }


COUNTS = "num_experts_per_layer"


@pytest.mark.parametrize(("section", "named"), [
    ({COUNTS: [1, 1, 1, 1, 2, 1]}, f"{COUNTS}[1] is 1, expected 2 to 4"),
    ({COUNTS: [1, 4, 1, 1, 5, 1]}, f"{COUNTS}[4] is 5, expected 2 to 4"),
    ({COUNTS: [2, 4, 1, 1, 2, 1]}, f"{COUNTS}[0] is 2, expected 1 (it has no experts)"),
    ({COUNTS: [1, 4, 1]}, f"{COUNTS} lists 3 layers, the model has 6"),
    ({COUNTS: [1, 4.5, 1, 1, 2, 1]}, f"compress.{COUNTS}.1"),
    ({COUNTS: 4}, f"compress.{COUNTS}"),
    ({"router_rows": 3}, "router_rows is 3, fewer than the 4 experts"),
    ({"router_rows": 0}, "compress.router_rows"),
    ({"router_rows": 10**9}, "compress.router_rows"),
    ({"router_rows": True}, "compress.router_rows"),
    ({"experts": 4}, "compress.experts"),
    ("pruned", "compress"),
    (None, "compress"),
])  # fmt: skip
def test_a_section_that_does_not_fit_is_named_with_its_file(cases, tmp_path, section, named):
    values = json.loads((cases("different numbers").folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"compress": section}))
    message = refusal(lambda: inspect(str(tmp_path)))
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and named in message


@pytest.mark.parametrize(("values", "named"), [
    ({"num_experts": 1, "num_experts_per_tok": 1, "compress": {"router_rows": 4}}, "no layer has a router"),
    ({"num_experts": 1, "num_experts_per_tok": 1}, f"{COUNTS}[1] is 4, expected 1"),
    ({"num_experts": 2}, f"{COUNTS}[1] is 4, expected 2"),
    ({"num_experts_per_tok": 3}, f"{COUNTS}[4] is 2, expected 3 to 4"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds num_experts 4"),
])  # fmt: skip
def test_counts_that_do_not_fit_the_other_keys_are_named(cases, tmp_path, values, named):
    whole = json.loads((cases("different numbers").folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(whole | values))
    message = refusal(lambda: inspect(str(tmp_path)))
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and named in message


@pytest.mark.parametrize("name", [name for name in CASES if name not in STOCK])
def test_a_checkpoint_that_lost_its_section_is_refused(cases, tmp_path, name):
    """As after another tool has rewritten config.json: shapes or names no longer fit."""
    values = json.loads((cases(name).folder / "config.json").read_text())
    del values["compress"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(cases(name).folder / "model.safetensors")
    for action in (Checkpoint, compress.load):
        assert "config.json implies" in refusal(lambda run=action: run(tmp_path)).replace(f"{tmp_path}/", "")
