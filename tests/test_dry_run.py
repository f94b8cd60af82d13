"""The plan shows a pass as YAML that a recipe can hold: the keys that have an effect, and no others."""

from pathlib import Path

import pytest
import yaml

from compress.apply import pipeline
from compress.passes import prune_experts, quantize
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve


def passes_of(plan: str) -> list[dict]:
    """The passes of a printed plan, as YAML reads them."""
    lines, taken = [], False
    for line in plan.splitlines():
        taken = line.startswith("pass ") or (taken and line.startswith(" "))
        if taken:
            lines.append(("- " if line.startswith("pass ") else "  ") + line[10:])
    return yaml.safe_load("\n".join(lines))


def planned(compress_cli, recipe, *arguments) -> list[dict]:
    result = compress_cli("apply", recipe, "--dry-run", *arguments)
    assert result.exit_code == 0, result.output
    return passes_of(result.stdout)


@pytest.mark.parametrize("name", sorted(resources.shipped_recipes()))
def test_a_printed_pass_means_what_the_recipe_means(compress_cli, tmp_path, name):
    printed = planned(compress_cli, name)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump({"version": 1, "passes": printed or []}))
    again, recipe = (load_recipe(str(source)).recipe for source in (tmp_path / "again.yaml", name))
    assert again.passes == recipe.passes


ROUNDED = {"method", "weights", "clip"}
GPTQ = {"damping", "act_order", "min_tokens"}
STATIC = {"activations", "activation_range", "min_tokens"}
IN_FORCE = [  # options of quantize, and the keys that have an effect
    ({}, ROUNDED),
    ({"method": "gptq"}, ROUNDED | GPTQ),
    ({"damping": 0.5, "act_order": False, "min_tokens": 9}, ROUNDED),
    ({"roles": {"lm_head": "int8"}}, ROUNDED | {"roles"}),
    ({"activation_range": "percentile", "percentile": 0.9}, ROUNDED),
    ({"activation_roles": {"experts": "none"}}, ROUNDED),
    ({"activations": "dynamic-int8", "activation_range": "mse"}, ROUNDED | {"activations"}),
    ({"activations": "static-int8"}, ROUNDED | STATIC),
    ({"activations": "static-int8", "activation_range": "percentile"}, ROUNDED | STATIC | {"percentile"}),
    ({"activation_roles": {"mlp": "static-fp8"}, "rotate": ["mlp"]}, ROUNDED | STATIC | {"activation_roles", "rotate"}),
    ({"method": "gptq", "activations": "dynamic-fp8"}, ROUNDED | GPTQ | {"activations"}),
    ({"equalize": 0.5}, ROUNDED | {"equalize"}),
]


@pytest.mark.parametrize(("options", "keys"), IN_FORCE, ids=[str(options) for options, _ in IN_FORCE])
def test_quantize_shows_the_keys_that_have_an_effect(options, keys):
    assert set(quantize.Options(**options).in_force()) == keys


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"keep": 4}, {"method", "keep", "router", "recovery", "damping"}),
        ({"fraction": 0.25, "recovery": "none"}, {"method", "fraction", "router", "recovery"}),
        ({"budget": 0.25, "method": "merge"}, {"method", "budget", "router", "recovery", "damping", "merge_weights"}),
    ],
)
def test_prune_experts_shows_the_keys_that_have_an_effect(options, keys):
    assert set(prune_experts.Options(**options).in_force()) == keys


def test_an_override_is_shown_without_what_it_leaves_open():
    override = {"role": "experts", "layers": [1], "weights": "int4-g32"}
    assert quantize.Options(overrides=(override,)).in_force()["overrides"] == [override]


OTHERWISE = {
    "damping": 0.5,
    "act_order": False,
    "min_tokens": 1,
    "activation_range": "percentile",
    "percentile": 0.6,
}


def checkpoint(tmp_path: Path, small: Path, name: str, options: dict) -> dict[str, bytes]:
    """The shards that `quantize` with these options writes."""
    recipe = {"version": 1, "passes": [{"quantize": options}], "calibration": {"prompts": ["self"], "samples": 2}}
    recipe["calibration"]["length"] = 16
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    loaded = load_recipe(str(tmp_path / f"{name}.yaml"))
    pipeline.apply(pipeline.Job(loaded, resolve(str(small)), tmp_path / name))
    return {path.name: path.read_bytes() for path in (tmp_path / name / "checkpoint").glob("*.safetensors")}


@pytest.mark.parametrize(
    "options", [{}, {"activations": "dynamic-int8"}, {"method": "gptq"}, {"activations": "static-int8"}], ids=str
)
def test_a_key_that_is_not_shown_changes_no_byte(small, tmp_path, options):
    idle = {key: OTHERWISE[key] for key in OTHERWISE.keys() - quantize.Options(**options).in_force().keys()}
    assert idle
    plain, other = (checkpoint(tmp_path, small, name, o) for name, o in (("plain", options), ("other", options | idle)))
    assert plain == other


def test_the_resolved_recipe_keeps_every_key(applied):
    (step,) = load_recipe(str(applied / "recipe.resolved.yaml")).recipe.passes
    written = yaml.safe_load((applied / "recipe.resolved.yaml").read_text())["passes"][0]["quantize"]
    assert step.options == load_recipe("tiny-int8").recipe.passes[0].options
    assert set(written) == set(quantize.Options.model_fields) - {"equalize"}, "all but what has no value"
