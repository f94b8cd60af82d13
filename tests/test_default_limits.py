"""Default limits: what an artifact's formats are expected to cost is told from the artifact alone, and is near what it does cost."""

import json
import math
import shutil
from pathlib import Path
from typing import get_args

import pytest
import refusals
from jamba_models import make_jamba
from state_models import with_states

from compress.apply import exporting, pipeline
from compress.check import costs
from compress.check.default_limits import limits
from compress.check.expected import Expected, expected
from compress.formats.state_words import Format, Rounding
from compress.model.roles import Role
from compress.model.states import StateKind
from compress.recipe import source
from compress.recipe.check import METRICS
from compress.recipe.recipe import load_recipe
from compress.runtime.artifacts import find_artifact, open_artifact

QUICK = ("--prompts", "heldout", "--samples", 3, "--length", 48, "--no-audit")


def applied(model: Path, out: Path, *overrides: str) -> Path:
    """The checkpoint of the quick-start recipe with these changes."""
    loaded = load_recipe("tiny-int8", ("check=null", "export=[]", *overrides))
    pipeline.apply(pipeline.Job(loaded, source.resolve(str(model)), out))
    return out / "checkpoint"


@pytest.fixture(scope="module")
def cost_of(tiny, tmp_path_factory):
    """What tiny-jamba is expected to cost with these overrides of the quick-start recipe; each is applied once."""
    known: dict[tuple[str, ...], Expected] = {}

    def of(*overrides: str) -> Expected:
        if overrides not in known:
            folder = applied(tiny, tmp_path_factory.mktemp("variant") / "out", *overrides)
            known[overrides] = expected(open_artifact(tiny), open_artifact(folder))
        return known[overrides]

    return of


# what is told from an artifact


def test_a_model_beside_itself_is_expected_to_cost_nothing(tiny):
    assert expected(open_artifact(tiny), open_artifact(tiny)) == Expected(tail=costs.COSTS["jamba"].tail)


@pytest.mark.parametrize("coarser, finer", [
    ("int4-g32", "int8"), ("fp8-e4m3", "int8"), ("int8-tensor", "int8"), ("int8", "int8-g32"), ("int8-g32", "int8-g16"),
    ("int4-g32", "int4-g16"), ("int8", "fp16"),
])  # fmt: skip
def test_a_coarser_format_is_expected_to_cost_more(cost_of, coarser, finer):
    assert (
        cost_of(f"passes.0.quantize.weights={coarser}").weights > cost_of(f"passes.0.quantize.weights={finer}").weights
    )


def test_all_roles_in_int8_are_expected_to_cost_what_they_do(cost_of):
    """benchmarks/RESULTS.md: 0.00049 on 24,576 tokens of other text than the table was made on."""
    assert cost_of().weights == pytest.approx(0.00049, rel=0.25)


def test_a_role_alone_is_expected_to_cost_what_it_does(cost_of):
    """docs/quantization.md, `sensitivity`: the output matrix 0.0448 in int4-g32, dense MLPs 0.0080."""
    for role, measured in (("lm_head", 0.0448), ("mlp", 0.0080)):
        cost = cost_of("passes.0.quantize.weights=none", f"passes.0.quantize.roles={{{role}: int4-g32}}")
        assert cost.weights == pytest.approx(measured, rel=0.3)


def test_some_layers_of_a_role_cost_more_than_their_share_and_less_than_all(cost_of):
    def of(weights: str, *layers: str) -> float:
        override = f"passes.0.quantize.overrides=[{{role: mlp, layers: [{', '.join(layers)}], weights: int4-g32}}]"
        return cost_of(f"passes.0.quantize.weights={weights}", override).weights

    one, two, all_four = of("none", "0"), of("none", "0", "2"), of("none", "0", "2", "4", "6")
    assert all_four / 4 < one < two < all_four


def test_rounding_with_gptq_is_expected_to_cost_less(cost_of):
    little = ("calibration={prompts: [prose], samples: 1, length: 32}", "passes.0.quantize.method=gptq")
    assert cost_of(*little).weights < 0.8 * cost_of().weights


@pytest.mark.parametrize("inputs", ["dynamic-int8", "dynamic-fp8"])
def test_inputs_that_are_rounded_are_expected_to_cost_too(cost_of, inputs):
    cost = cost_of(f"passes.0.quantize.activations={inputs}")
    assert cost.weights == cost_of().weights
    assert cost.inputs > 0 == cost_of().inputs


def test_a_rotated_input_is_expected_to_cost_less_than_one_with_outliers(tiny):
    known = costs.COSTS["jamba"]
    assert known.inputs_of(Role.MLP, "static-int8 rotated") < 0.3 * known.inputs_of(Role.MLP, "static-int8")


def test_a_graph_is_expected_to_round_inputs_beside_packed_integers_and_no_others(tiny, tmp_path):
    checkpoint = applied(tiny, tmp_path / "int8")
    graph = exporting.export_checkpoint(checkpoint, "onnx", tmp_path / "onnx", ())
    of_checkpoint, of_graph = (
        expected(open_artifact(tiny), open_artifact(find_artifact(path))) for path in (checkpoint, graph)
    )
    assert (of_graph.weights, of_checkpoint.inputs) == (of_checkpoint.weights, 0)
    assert of_graph.inputs == pytest.approx(0.00025, rel=0.5)  # what onnxruntime adds, benchmarks/RESULTS.md
    plain = exporting.export_checkpoint(tiny, "onnx", tmp_path / "plain", ())
    assert expected(open_artifact(tiny), open_artifact(find_artifact(plain))).inputs == 0


def test_of_two_compressed_models_both_count(cost_of, tiny, tmp_path):
    one = open_artifact(applied(tiny, tmp_path / "int8"))
    assert expected(one, one).weights == pytest.approx(2 * cost_of().weights)


def test_a_tied_table_costs_as_what_is_looked_up_and_as_the_output_matrix(cost_of, tmp_path):
    tied = make_jamba(tmp_path / "tied", tie_word_embeddings=True)
    checkpoint = applied(tied, tmp_path / "out")
    assert expected(open_artifact(tied), open_artifact(checkpoint)).weights == pytest.approx(cost_of().weights)


def stated(tiny: Path, folder: Path, form: dict, *, by_a_pass: bool = True, layers=None) -> Expected:
    """Of a model that keeps its recurrent states so."""
    kept = with_states(tiny, folder, {"recurrent_state": form}, layers)
    config = json.loads((kept / "config.json").read_text())
    config["compress"]["passes"] = [{"name": "state_precision", "changes": []}] if by_a_pass else []
    (kept / "config.json").write_text(json.dumps(config))
    return expected(open_artifact(tiny), open_artifact(kept))


def test_states_in_few_bits_are_expected_to_cost_where_tokens_are_decoded(tiny, tmp_path):
    """docs/state-precision.md: int8 stochastic 9.1e-6 to 3.0e-5, to nearest 9 times that, int4 60 times."""
    int8 = stated(tiny, tmp_path / "int8", {"format": "int8", "rounding": "stochastic"})
    nearest = stated(tiny, tmp_path / "nearest", {"format": "int8"})
    int4 = stated(tiny, tmp_path / "int4", {"format": "int4", "rounding": "stochastic"})
    some = stated(tiny, tmp_path / "some", {"format": "int4", "rounding": "stochastic"}, layers=(0, 1))
    static = stated(tiny, tmp_path / "static", {"format": "int8", "scale": "static"})
    assert 5e-6 < int8.states < 1e-4 and int8.weights == int8.inputs == 0
    assert nearest.states > 3 * int8.states and int4.states > 20 * int8.states and static.states > nearest.states
    assert int4.states / 3 < some.states < int4.states


def test_states_that_no_pass_decided_on_are_not_expected_to_cost_anything(tiny, tmp_path):
    assert stated(tiny, tmp_path / "kept", {"format": "fp8-e4m3"}, by_a_pass=False).states == 0


@pytest.mark.parametrize(
    "keep, recovery", [(7, "least_squares"), (6, "least_squares"), (6, "none"), (4, "least_squares")]
)
def test_removed_experts_are_expected_to_cost_by_how_many_there_were(tiny, tmp_path, keep, recovery):
    """docs/expert-pruning.md, of 8."""
    pruning = f"passes=[{{prune_experts: {{keep: {keep}, method: frequency, recovery: {recovery}}}}}]"
    checkpoint = applied(tiny, tmp_path / "out", pruning, "calibration={prompts: [prose], samples: 4, length: 64}")
    cost = expected(open_artifact(tiny), open_artifact(checkpoint))
    measured = {
        (7, "least_squares"): 0.00015,
        (6, "least_squares"): 0.00043,
        (6, "none"): 0.00125,
        (4, "least_squares"): 0.0264,
    }
    assert cost.prunes and cost.weights == pytest.approx(measured[keep, recovery], rel=0.3)
    assert "kl_divergence_tail_ratio" not in limits(cost)  # few tokens need what is gone


def test_a_family_that_was_not_measured_costs_as_the_costlier_of_those_that_were():
    unknown, jamba, nemotron = (costs.of_family(name) for name in ("toy", "jamba", "nemotron_h"))
    assert unknown.weights_of(Role.EXPERTS, "int8") >= max(
        known.weights_of(Role.EXPERTS, "int8") for known in (jamba, nemotron)
    )


@pytest.mark.parametrize("family", costs.COSTS)
@pytest.mark.parametrize("scale", ["none", "dynamic", "static", "d_inner"])
def test_every_way_of_keeping_a_state_has_a_cost(family, scale):
    """But none at all, where the state stays in float32."""
    ways = [(form, rounding) for form in get_args(Format) for rounding in get_args(Rounding)]
    found = {(kind, *way): costs.COSTS[family].states_of(kind, *way, scale) for kind in StateKind for way in ways}
    assert {form for (_, form, _), cost in found.items() if cost == 0} == {"fp32"}


def test_a_role_that_was_not_measured_costs_as_the_costliest():
    jamba = costs.COSTS["jamba"]
    assert jamba.weights_of(Role.MOE_LATENT, "int8") == max(row["int8"] for row in jamba.weights.values())


# what follows from it


def test_limits_leave_room_for_what_is_expected_and_grow_with_it():
    """A text that the original wrote itself has a perplexity ratio of exp(KL)."""
    earlier = limits(Expected())
    for cost in (1e-5, 1e-4, 1e-3, 0.01, 0.03):
        found = limits(Expected(weights=cost, tail=12.0))
        assert found["kl_divergence_mean"] > 1.5 * cost
        assert found["perplexity_ratio"] > math.exp(cost)
        assert found["top1_agreement"] < 1 - 1.2 * math.sqrt(cost)
        assert found["kl_divergence_mean"] > earlier["kl_divergence_mean"]
        assert found["top1_agreement"] < earlier["top1_agreement"]
        earlier = found


def test_what_decoding_may_change_follows_from_what_is_rounded_there():
    tight, rounded, kept = (limits(cost)["decode_prefill_difference"] for cost in (
        Expected(weights=0.01), Expected(weights=0.01, apart=4e-4), Expected(weights=0.01, apart=5e-3)
    ))  # fmt: skip
    assert tight <= 0.005 < rounded < kept


def test_no_cost_however_large_gives_a_limit_that_no_value_can_meet():
    found = limits(Expected(weights=2.0, inputs=3.0, states=1.0))
    assert found["top1_agreement"] == 0 and all(map(math.isfinite, found.values()))


# where they are asked for


def rows(result) -> dict:
    return {
        (row["metric"], row["phase"]): row for row in json.loads(result.stdout)["checks"] if row["prompts"] == "all"
    }


@pytest.fixture(scope="module")
def int8(tiny, tmp_path_factory) -> Path:
    return applied(tiny, tmp_path_factory.mktemp("int8") / "out")


def test_check_takes_them_from_the_artifact_alone(compress_cli, tiny, int8, tmp_path):
    alone = tmp_path / "alone"
    shutil.copytree(int8, alone)
    result = compress_cli("check", tiny, alone, *QUICK, "--limits", "default", "--json", "-")
    assert result.exit_code in (0, 1), result.stderr
    of_int8 = limits(expected(open_artifact(tiny), open_artifact(alone)))
    found = {(metric, phase): row["limit"] for (metric, phase), row in rows(result).items() if row["limit"] is not None}
    assert found == {
        (metric, phase): limit
        for metric, limit in of_int8.items()
        for phase in ("prefill", "decode")
        if phase in METRICS[metric].phases
    }
    assert any("checkpoint: default limits" in remark for remark in json.loads(result.stdout)["remarks"])


def test_a_limit_on_the_command_line_stands_in_place_of_the_default_of_its_metric(compress_cli, tiny, int8):
    arguments = ("--limits", "default", "--limit", "kl_divergence_mean=1e-9", "--json", "-")
    result = compress_cli("check", tiny, int8, *QUICK, *arguments)
    assert result.exit_code == 1
    assert rows(result)["kl_divergence_mean", "prefill"]["limit"] == 1e-9
    assert rows(result)["top1_agreement", "prefill"]["limit"] < 1


def test_an_unchanged_model_holds_them(compress_cli, tiny):
    result = compress_cli("check", tiny, tiny, *QUICK, "--limits", "default", "--json", "-")
    assert (result.exit_code, json.loads(result.stdout)["verdict"]) == (0, "pass")


def test_a_file_of_that_name_is_one_where_it_is_given_with_its_folder(compress_cli, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("default").write_text("top1_agreement: 97\n")
    message = refusals.refusal_of_command(compress_cli("check", tiny, tiny, "--limits", "./default"))
    assert "default: limits.top1_agreement" in message and "no value can reach 97" in message


def test_a_recipe_asks_for_them_with_a_word(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\ncheck:\n  samples: 3\n  limits: default\n")
    loaded = load_recipe(str(recipe))
    assert loaded.recipe.check.limited_by_default and loaded.recipe.check.limits == {}
    again = tmp_path / "again.yaml"
    again.write_text(loaded.resolved_yaml())
    assert load_recipe(str(again)).recipe == loaded.recipe


def test_a_limit_that_is_set_on_top_stands_beside_them(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\ncheck:\n  limits: default\n")
    loaded = load_recipe(str(recipe), ("check.limits.kl_divergence_mean=0.5",))
    assert loaded.recipe.check.limited_by_default and loaded.recipe.check.limits == {"kl_divergence_mean": 0.5}
    again = tmp_path / "again.yaml"
    again.write_text(loaded.resolved_yaml())
    assert load_recipe(str(again)).recipe == loaded.recipe
    only = load_recipe(str(recipe), ("check.limits={kl_divergence_mean: 0.5}",)).recipe.check
    assert not only.limited_by_default and only.limits == {"kl_divergence_mean": 0.5}


@pytest.mark.parametrize("value", ["defualt", "3", "[default]", "", "true"])
def test_another_word_is_refused(tmp_path, value):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\ncheck:\n  limits: {value}\n")
    message = refusals.refusal(lambda: load_recipe(str(recipe)))
    assert "recipe.yaml:3: check.limits" in message and "expected 'default', or a mapping of METRIC: VALUE" in message


def test_apply_gives_every_artifact_its_own(compress_cli, tiny, tmp_path):
    """onnxruntime rounds the inputs of its integer products, the checkpoint's are not."""
    brief = (
        "check.prompts=[heldout]",
        "check.samples=3",
        "check.length=32",
        "check.audit=false",
        "check.limits=default",
    )
    settings = [word for override in brief for word in ("--set", override)]
    compress_cli("apply", "tiny-int8", "-m", tiny, "-o", tmp_path / "out", *settings)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    of = {
        row["artifact"]: row["limit"]
        for row in report["checks"]
        if row["metric"] == "kl_divergence_mean" and row["limit"]
    }
    assert 0 < of["checkpoint"] < of["onnx"]
    assert len([remark for remark in report["remarks"] if "default limits" in remark]) == 2
    resolved = (tmp_path / "out" / "recipe.resolved.yaml").read_text()
    assert "limits: default" in resolved
