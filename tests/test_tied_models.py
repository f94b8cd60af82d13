"""Models whose embedding is the output matrix too: what recipes mean by `lm_head` there, and what the table is fitted to."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from interruptions import stop_after
from jamba_models import make_jamba
from refusals import refusal
from test_calibration import Applied, apply, input_scales, inputs_of
from test_onnx_formats import Applied as Exported

from compress.apply import pipeline
from compress.calibration import inputs as calibration_inputs
from compress.checkpoint.reader import Checkpoint
from compress.checkpoint.writer import ShardWriter
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime.inference import HiddenStates

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 4, "spread": 0.7}
ONLY = {"weights": "none"}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_jamba(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True, **SHAPE)


@pytest.fixture(scope="module")
def gptq(tied, tmp_path_factory) -> Applied:
    """The table alone in int4, so that what reaches it is what reaches it in the model as it came."""
    options = ONLY | {"method": "gptq", "roles": {"lm_head": "int4-g32"}}
    return apply(tied, tmp_path_factory.mktemp("gptq"), options)


def table_of(applied: Applied):
    return applied.weights[EMBEDDING]


def errors(model, applied: Applied) -> tuple[float, float]:
    """Of the table: the mean squared error of its products with the true inputs, and of its rows by themselves."""
    x = inputs_of(model, applied.windows)[HEAD]
    error = table_of(applied).dense().double() - Checkpoint(model).model.unit("embedding").weights[EMBEDDING].dense()
    return float(F.linear(x, error).square().mean()), float(error.square().mean())


def test_a_tied_table_is_fitted_to_what_reaches_it_as_the_output_matrix(tied, gptq, tmp_path):
    nearest = apply(tied, tmp_path, ONLY | {"clip": "mse", "roles": {"lm_head": "int4-g32"}, "equalize": 0.5})
    assert table_of(gptq).format == table_of(nearest).format == "int4-g32"
    (product, row), (nearest_product, nearest_row) = errors(tied, gptq), errors(tied, nearest)
    assert product < 0.8 * nearest_product
    assert row < 1.3 * nearest_row  # its rows are looked up too


def test_rows_count_by_themselves_so_that_looking_them_up_loses_little(tied, gptq, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_inputs, "LOOKUP_SHARE", 0.0)
    product_alone = apply(tied, tmp_path, ONLY | {"method": "gptq", "roles": {"lm_head": "int4-g32"}})
    assert errors(tied, gptq)[1] < errors(tied, product_alone)[1]


def test_the_report_says_that_a_table_was_rounded_to_nearest_only_where_it_is_no_output_matrix(gptq, small, tmp_path):
    assert "rounded_to_nearest" not in gptq.details
    untied = apply(small, tmp_path, ONLY | {"method": "gptq", "roles": {"embedding": "int8"}})
    assert untied.details["rounded_to_nearest"] == [EMBEDDING]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_fixed_range_of_the_tied_matrix_is_that_of_its_true_inputs(tied, tmp_path, method):
    options = ONLY | {"method": method, "roles": {"lm_head": "int8"}, "activation_roles": {"lm_head": "static-int8"}}
    applied = apply(tied, tmp_path, options)
    largest = float(inputs_of(tied, applied.windows)[HEAD].abs().max())
    assert input_scales(applied) == {EMBEDDING: pytest.approx(largest / 127, rel=1e-5)}


INTERRUPTED = [(HiddenStates, "write", 3), (ShardWriter, "write", 1), (ShardWriter, "publish", 2)]


@pytest.mark.parametrize(("owner", "name", "calls"), INTERRUPTED, ids=[f"{o.__name__}.{n}" for o, n, _ in INTERRUPTED])
def test_an_interrupted_run_on_a_tied_model_resumes_to_the_same_bytes(tied, gptq, tmp_path, owner, name, calls):
    options = ONLY | {"method": "gptq", "roles": {"lm_head": "int4-g32"}}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, owner, name, calls)
        with pytest.raises(KeyboardInterrupt):
            apply(tied, tmp_path, options)
    resumed = apply(tied, tmp_path, options, resume=True)
    assert resumed.digests == gptq.digests
    assert not list(resumed.out.rglob("*.f32"))


def test_a_damaged_note_on_the_table_is_made_again(tied, gptq, tmp_path):
    options = ONLY | {"method": "gptq", "roles": {"lm_head": "int4-g32"}}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, ShardWriter, "publish", 3)
        with pytest.raises(KeyboardInterrupt):
            apply(tied, tmp_path, options)
    note = tmp_path / "out.partial" / "calibration" / "note-0-00000.json"
    note.write_bytes(bytes([note.read_bytes()[0] ^ 1]) + note.read_bytes()[1:])
    assert apply(tied, tmp_path, options, resume=True).digests == gptq.digests


def test_a_tied_model_is_pruned_and_then_quantized_in_one_recipe(tmp_path):
    model = make_jamba(tmp_path / "model", tie_word_embeddings=True, num_experts=4, **SHAPE)
    recipe = tmp_path / "recipe.yaml"
    passes = "[{prune_experts: {keep: 3}}, {quantize: {method: gptq, weights: int8, activations: static-int8}}]"
    recipe.write_text(f"version: 1\ncalibration: {{prompts: [self], samples: 4, length: 64}}\npasses: {passes}\n")
    pipeline.apply(pipeline.Job(load_recipe(str(recipe)), resolve(str(model)), tmp_path / "out"))
    table = Checkpoint(tmp_path / "out" / "checkpoint", allow_quantized=True).model.unit("embedding").weights[EMBEDDING]
    assert (table.format, table.activation.format) == ("int8", "static-int8")


# ---- what a recipe means


def planned(model, tmp_path, **options):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump({"version": 1, "calibration": {"prompts": ["self"]}, "passes": [{"quantize": options}]})
    )
    return pipeline.prepare(pipeline.Job(load_recipe(str(recipe)), resolve(str(model)), tmp_path / "out"))


def fate(plan) -> tuple:
    """Format, activation and rotation of the table."""
    table = plan.result.unit("embedding").weights[EMBEDDING]
    return table.format, table.activation and table.activation.format, table.rotation


HEAD_OVERRIDE = [{"role": "lm_head", "projections": ["lm_head"], "weights": "int8"}]
MEANT = {
    "its format": ({"roles": {"lm_head": "int8-g32"}}, ("int8-g32", None, None)),
    "its format before the embedding's": (
        {"roles": {"embedding": "int4-g32", "lm_head": "int8-g32"}}, ("int8-g32", None, None)),
    "its format before an override of the embedding": (
        {"roles": {"lm_head": "int8-g32"}, "overrides": [{"role": "embedding", "weights": "int4-g32"}]},
        ("int8-g32", None, None)),
    "that it stays": ({"roles": {"embedding": "int4-g32", "lm_head": "none"}}, ("bf16", None, None)),
    "an override": ({"roles": {"embedding": "int4-g32"}, "overrides": HEAD_OVERRIDE}, ("int8", None, None)),
    "the embedding, where only that is named": ({"roles": {"embedding": "int4-g32"}}, ("int4-g32", None, None)),
    "its activation": ({"activation_roles": {"lm_head": "static-fp8"}}, ("fp8-e4m3", "static-fp8", None)),
    "its activation before the embedding's": (
        {"activation_roles": {"embedding": "dynamic-fp8", "lm_head": "none"}, "activations": "static-fp8"},
        ("fp8-e4m3", None, None)),
    "the default activation of an output matrix": ({"activations": "static-fp8"}, ("fp8-e4m3", "static-fp8", None)),
    "none, as an embedding": (
        {"activations": "static-fp8", "activation_roles": {"embedding": "none"}}, ("fp8-e4m3", None, None)),
    "no activation beside weights that stay": (
        {"activations": "static-fp8", "roles": {"embedding": "none"}}, ("bf16", None, None)),
    "its rotation": ({"activations": "dynamic-fp8", "rotate": ["lm_head"]}, ("fp8-e4m3", "dynamic-fp8", 64)),
}  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), MEANT.values(), ids=list(MEANT))
def test_what_a_recipe_says_of_the_output_matrix_goes_for_the_embedding_it_is_tied_to(
    tied, tmp_path, options, expected
):
    assert fate(planned(tied, tmp_path, **{"weights": "fp8-e4m3"} | options)) == expected


def test_a_projection_that_the_tied_matrix_does_not_have_is_refused(tied, tmp_path):
    override = [{"role": "lm_head", "projections": ["head"], "weights": "int8"}]
    assert "covers no matrix" in refusal(lambda: planned(tied, tmp_path, overrides=override))


def test_activations_beside_a_tied_matrix_that_stays_are_refused(tied, tmp_path):
    options = {"roles": {"lm_head": "none"}, "activation_roles": {"lm_head": "dynamic-int8"}}
    message = refusal(lambda: planned(tied, tmp_path, **options))
    assert "not quantized" in message and "lm_head" in message


def test_fixed_activations_of_an_embedding_that_is_only_looked_up_are_refused(small, tmp_path):
    message = refusal(lambda: planned(small, tmp_path, activation_roles={"embedding": "static-int8"}))
    assert "'embedding'" in message and "not tied" in message


@pytest.mark.parametrize(
    ("roles", "said"),
    [
        ({"lm_head": "int8"}, ["'lm_head' means the embedding"]),
        ({"lm_head": "int8", "embedding": "int8"}, ["'lm_head' means the embedding", "wins over 'embedding'"]),
        ({"embedding": "int8"}, []),
    ],
)
def test_the_plan_and_the_report_say_what_lm_head_means(compress_cli, tied, small, tmp_path, roles, said):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"version": 1, "passes": [{"quantize": {"roles": roles}}]}))
    plans = {
        model: compress_cli("apply", recipe, "-m", model, "-o", tmp_path / "out", "--dry-run")
        for model in (tied, small)
    }
    assert plans[tied].exit_code == plans[small].exit_code == 0
    notes = [line for line in plans[tied].stdout.splitlines() if line.startswith("note ")]
    assert len(notes) == bool(said) and all(words in notes[0] for words in said)
    assert "note " not in plans[small].stdout
    assert compress_cli("apply", recipe, "-m", tied, "-o", tmp_path / "out").exit_code == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert ("embeddings are tied" in report) == bool(said) and all(words in report for words in said)


# ---- what runs


TYPES = [("int8", "static-int8"), ("int8", "dynamic-int8"), ("int8-g32", "static-int8"), ("int4-g32", "static-int8"),
         ("fp8-e4m3", "static-fp8")]  # fmt: skip


@pytest.mark.parametrize(("number_format", "activation"), TYPES, ids=" ".join)
def test_the_onnx_file_rounds_the_tied_matrix_and_its_input_as_the_checkpoint_does(tmp_path, number_format, activation):
    options = {"method": "gptq", "weights": "none", "roles": {"lm_head": number_format}}
    changes = {key: value for key, value in SHAPE.items() if key != "spread"} | {"tie_word_embeddings": True}
    applied = Exported(tmp_path, changes, options | {"activation_roles": {"lm_head": activation}})
    table = applied.weights[EMBEDDING]
    assert (table.format, table.activation.format) == (number_format, activation)
    ids = applied.ids(4, 40)
    ours, theirs = (
        torch.from_numpy(logits).log_softmax(-1) for logits in (applied.own_logits(ids), applied.onnx_logits(ids, 30))
    )
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 1e-6
    assert np.isfinite(theirs.numpy()).all()
