"""Recipes: what loads, what is refused and how the refusal reads, and what `--set` changes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import refusals
from jamba_models import AWKWARD
from safetensors.torch import load_file, save_file

from compress.apply import pipeline
from compress.errors import InputError
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

RECIPE = """\
version: 1
model: models/tiny-jamba
passes:
  - quantize:
      method: rtn
      weights: int8
      roles:
        lm_head: int8
export:
  - onnx:
      opset: 21
check:
  prompts: [self]
  samples: 2
  length: 48
  limits:
    perplexity_ratio: 1.5
"""


@pytest.fixture
def write(tmp_path):
    """Writes a recipe file (text or bytes) and returns its path."""

    def to_file(content: str | bytes = RECIPE) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


def changed(old: str, new: str) -> str:
    assert old in RECIPE
    return RECIPE.replace(old, new, 1)


def refusal(path: Path, *overrides: str) -> str:
    """The one sentence with which a recipe is refused."""
    with pytest.raises(InputError) as caught:
        load_recipe(str(path), overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, "the contract promises one sentence"
    return message


def line_of(text: str, word: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if word in line)


@pytest.mark.parametrize("name", sorted(resources.shipped_recipes()))
def test_a_shipped_recipe_loads_by_name_and_names_a_model_that_is_there(name):
    loaded = load_recipe(name)
    assert loaded.name == name
    assert resources.find_model(loaded.recipe.model, loaded.folder).is_dir()


@pytest.mark.parametrize("name", sorted(resources.shipped_recipes()))
def test_a_shipped_recipe_begins_with_a_line_that_says_what_it_is_for(name):
    first = resources.find_recipe(name).read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 10


def test_a_recipe_says_what_it_says(write):
    recipe = load_recipe(str(write())).recipe
    assert recipe.model == "models/tiny-jamba"
    assert [step.name for step in recipe.passes] == ["quantize"]
    assert recipe.passes[0].options.roles == {"lm_head": "int8"}
    assert [step.name for step in recipe.export] == ["onnx"]
    assert recipe.check.prompts == ("self",)
    assert (recipe.check.samples, recipe.check.length) == (2, 48)
    assert recipe.check.limits == {"perplexity_ratio": 1.5}


def test_a_recipe_of_one_line_takes_every_default(write):
    recipe = load_recipe(str(write("version: 1\n"))).recipe
    assert (recipe.model, recipe.passes, recipe.export, recipe.check) == (None, (), (), None)


MISSPELT = [
    ("model:", "modle:", "modle", "model"),
    ("- quantize:", "- quantise:", "quantise", "quantize"),
    ("weights:", "wieghts:", "wieghts", "weights"),
    ("- onnx:", "- onxx:", "onxx", "onnx"),
    ("opset:", "opsett:", "opsett", "opset"),
    ("samples:", "sample:", "sample", "samples"),
    ("method: rtn", "method: rtm", "rtm", "rtn"),
    ("weights: int8", "weights: int9", "int9", "int8"),
    ("weights: int8", "weights: INT8", "INT8", "int8"),
    ("lm_head: int8", "lm_haed: int8", "lm_haed", "lm_head"),
    ("lm_head: int8", "lm_head: nune", "nune", "none"),
    ("perplexity_ratio", "perplexity_ratoi", "perplexity_ratoi", "perplexity_ratio"),
]


@pytest.mark.parametrize(("old", "new", "wrong", "right"), MISSPELT, ids=[case[2] for case in MISSPELT])
def test_a_misspelt_word_is_refused_with_file_line_and_nearest_match(write, old, new, wrong, right):
    text = changed(old, new)
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line_of(text, wrong)}: ")
    assert f"'{wrong}'" in message
    assert f"did you mean '{right}'?" in message


def test_a_word_like_no_other_is_refused_with_the_words_that_exist(write):
    message = refusal(write(changed("- onnx:", "- zzz:")))
    assert "'zzz'" in message
    assert "expected one of: " in message
    assert "onnx" in message.split("expected one of: ")[1]


OUT_OF_RANGE = [
    ("perplexity_ratio: 1.5", "perplexity_ratio: -1"),
    ("perplexity_ratio: 1.5", "perplexity_ratio: .nan"),
    ("perplexity_ratio: 1.5", "perplexity_ratio: .inf"),
    ("perplexity_ratio: 1.5", "perplexity_ratio: low"),
    ("samples: 2", "samples: 0"),
    ("samples: 2", "samples: -1"),
    ("samples: 2", "samples: 2.5"),
    ("samples: 2", "samples: .nan"),
    ("samples: 2", "samples: 1e30"),
    ("length: 48", "length: 1"),
    ("length: 48", "length: [48]"),
    ("opset: 21", "opset: 13"),
]


@pytest.mark.parametrize(("old", "new"), OUT_OF_RANGE, ids=[new for _, new in OUT_OF_RANGE])
def test_a_number_out_of_range_is_refused_with_its_key_and_line(write, old, new):
    text = changed(old, new)
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line_of(text, new)}: ")
    assert new.split(":")[0] in message


def test_the_smallest_allowed_check_loads(write):
    text = changed("samples: 2", "samples: 1").replace("length: 48", "length: 2")
    text = text.replace("perplexity_ratio: 1.5", "kl_divergence_mean: 0")
    check = load_recipe(str(write(text))).recipe.check
    assert (check.samples, check.length, check.limits) == (1, 2, {"kl_divergence_mean": 0.0})


@pytest.mark.parametrize("version", ["2", "0", "'one'", "[1]"])
def test_another_version_is_refused(write, version):
    assert "version" in refusal(write(changed("version: 1", f"version: {version}")))


def test_a_recipe_without_a_version_is_refused(write):
    assert "missing key 'version'" in refusal(write(changed("version: 1\n", "")))


KEPT = ["norm", "router", "ssm_conv", "ssm_a", "ssm_d", "ssm_dt_bias"]


@pytest.mark.parametrize("role", KEPT)
def test_a_role_that_must_keep_its_precision_cannot_be_quantized(write, role):
    path = write(changed("lm_head: int8", f"{role}: int8"))
    message = refusal(path)
    assert message.startswith(f"{path}:")
    assert f"'{role}'" in message


def test_the_refusal_of_such_a_role_names_its_own_line(write):
    text = changed("lm_head: int8", "norm: int8")
    path = write(text)
    assert refusal(path).startswith(f"{path}:{line_of(text, 'norm: int8')}: ")


def test_a_role_that_keeps_its_precision_may_be_spelt_out(write):
    recipe = load_recipe(str(write(changed("lm_head: int8", "norm: none")))).recipe
    assert recipe.passes[0].options.format_of("norm") == "none"


def test_a_role_takes_its_own_format_and_every_other_the_default(write):
    options = load_recipe(str(write(changed("lm_head: int8", "lm_head: none")))).recipe.passes[0].options
    assert (options.format_of("lm_head"), options.format_of("experts"), options.format_of("router")) == (
        "none",
        "int8",
        "none",
    )


def test_two_passes_in_one_list_item_are_refused(write):
    assert refusal(write(changed("  - quantize:", "  - prune: {}\n    quantize:")))


@pytest.mark.parametrize("item", ["{}", "quantize", "null", "3"])
def test_a_list_item_that_names_no_pass_is_refused_with_its_place(write, item):
    path = write(f"version: 1\npasses:\n  - {item}\n")
    message = refusal(path)
    assert message.startswith(f"{path}:3: ")
    assert "passes.0" in message


def test_an_exporter_listed_twice_is_refused(write):
    assert "twice" in refusal(write(changed("  - onnx:", "  - onnx: {}\n  - onnx:")))


def test_the_calibration_passages_cannot_be_checked_on(write):
    path = write(changed("[self]", "[self, prose]"))
    message = refusal(path)
    assert message.startswith(f"{path}:13: ")
    assert "'prose'" in message


@pytest.mark.parametrize("prompts", ["[self, self]", "[]", "self", "null"])
def test_a_list_of_prompts_that_makes_no_sense_is_refused(write, prompts):
    assert "prompts" in refusal(write(changed("[self]", prompts)))


def test_a_duplicate_key_is_refused_where_it_occurs_again(write):
    path = write(changed("      method: rtn\n", "      method: rtn\n      method: rtn\n"))
    message = refusal(path)
    assert message.startswith(f"{path}:6: ")
    assert "duplicate key 'method'" in message


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
SURPRISES = {
    "a tag that would run code": "version: 1\nmodel: !!python/object/apply:os.system ['true']\n",
    "a tag that changes a type": "version: !!str 1\n",
    "an anchor": "version: &v 1\n",
    "an alias": "version: 1\nmodel: *v\n",
    "nested aliases that grow without bound": BOMB,
    "a merge key": "<<: {version: 1}\nversion: 1\n",
    "two documents": "version: 1\n---\nversion: 1\n",
    "a list as a key": "version: 1\n? [a]\n: b\n",
    "a tab as indentation": "version: 1\ncheck:\n\tsamples: 1\n",
    "a control character": "version: 1\nmodel: \x00\n",
    "a date that does not exist": "version: 1\nmodel: 2001-99-99\n",
    "an unclosed bracket": "version: 1\npasses: [\n",
    "nothing": "",
    "only a comment": "# version: 1\n",
    "a list": "- version: 1\n",
    "one word": "version",
    "nested mappings without end": "{a: " * 2000,
    "nested lists without end": "[" * 1000,
}


@pytest.mark.parametrize("text", SURPRISES.values(), ids=list(SURPRISES))
def test_a_file_that_is_not_plain_data_is_refused_by_name(write, text):
    path = write(text)
    assert refusal(path).startswith(str(path))


SEVERAL_MEANINGS = [
    ("samples: 2", f"samples: {number}")
    for number in ("0512", "08", "00", "+007", "0x10", "0X1f", "0o17", "0b11", "1_000", "2:00", "1:30:00", "yes", "off")
] + [
    ("perplexity_ratio: 1.5", f"perplexity_ratio: {number}")
    for number in ("01.5", "1_0.5", "1:30.5", "0512", "1_0e3", "No", "2025-11-25")
] + [
    ("model: models/tiny-jamba", f"model: {name}")
    for name in ("no", "On", "0512", "2025-11-25", "2025-11-25 10:00:00", "1_000", "12:30")
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), SEVERAL_MEANINGS, ids=[new for _, new in SEVERAL_MEANINGS])
def test_a_plain_value_that_yaml_reads_in_several_ways_is_refused_with_its_key_and_line(write, old, new):
    text = changed(old, new)
    key, _, value = new.partition(": ")
    message = refusal(write(text))
    assert message.startswith(f"{write(text)}:{line_of(text, new)}: ")
    assert f"{key}: '{value}'" in message and "quotes" in message
    path = {"samples": "check.samples", "perplexity_ratio": "check.limits.perplexity_ratio"}.get(key, key)
    assert f"'{value}'" in refusal(write(), f"{path}={value}")


def test_such_a_value_inside_a_list_is_refused_with_its_place(write):
    assert "passes.0.quantize.overrides.0.layers.1: '2:00'" in refusal(
        write(changed("method: rtn", "overrides: [{role: mlp, layers: [0, 2:00], weights: int8}]"))
    )


@pytest.mark.parametrize("name", ["no", "0512", "08", "2:00", "1_000", "2025-11-25", "1e3", "3.1", "true", "null", "~"])
def test_such_a_word_in_quotes_is_text_and_stays_text_in_the_resolved_recipe(write, tmp_path, name):
    loaded = load_recipe(str(write(changed("model: models/tiny-jamba", f"model: '{name}'"))))
    assert loaded.recipe.model == name
    (tmp_path / "again.yaml").write_text(loaded.resolved_yaml())
    assert load_recipe(str(tmp_path / "again.yaml")).recipe.model == name


@pytest.mark.parametrize("name", ["3.1", "12", "true", "1e3"])
def test_a_number_in_the_place_of_text_is_refused_with_advice_to_quote_it(write, name):
    message = refusal(write(changed("model: models/tiny-jamba", f"model: {name}")))
    assert ":2: model: expected text" in message and "quotes" in message


@pytest.mark.parametrize(("written", "value"), [("1e-3", 0.001), ("1.5E-2", 0.015), (".5", 0.5), ("2", 2.0), ("0.10", 0.1),
                                                ("1.", 1.0), ("+3.0", 3.0)])  # fmt: skip
def test_a_decimal_number_is_that_number(write, written, value):
    recipe = load_recipe(str(write(changed("perplexity_ratio: 1.5", f"perplexity_ratio: {written}")))).recipe
    assert recipe.check.limits == {"perplexity_ratio": value}


def test_a_file_of_limits_is_read_by_the_same_rules(compress_cli, tmp_path, tiny):
    limits = tmp_path / "limits.yaml"
    for text, said in (
        ("kl_divergence_mean: 0512\n", "'0512'"),
        ("top1_agreement: 1\ntop1_agreement: 0\n", "duplicate key"),
    ):
        limits.write_text(text)
        message = refusals.refusal_of_command(compress_cli("check", tiny, tiny, "--limits", limits))
        assert said in message and str(limits) in message


def test_a_file_that_is_not_text_is_refused(write):
    assert "UTF-8" in refusal(write(RECIPE.encode() + b"\xff\xfe"))


def test_a_file_too_large_to_be_a_recipe_is_refused(write):
    assert "larger" in refusal(write(RECIPE + "#" * (2 << 20)))


def test_a_hundred_thousand_open_brackets_are_refused_without_hanging(write):
    """In a process of its own, so that a parser that never ends fails this test instead of stopping the run."""
    code = "import sys; from compress.strict.yaml_text import load; from pathlib import Path; load(Path(sys.argv[1]))"
    arguments = [sys.executable, "-c", code, str(write("[" * 100_000))]
    # a parser that gives up at some depth needs well under a second; one that is quadratic in it, hours
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    assert "InputError" in result.stderr


def test_a_recipe_that_is_not_there_is_refused_with_the_nearest_shipped_one():
    with pytest.raises(InputError, match="did you mean 'tiny-int8'"):
        load_recipe("tiny-in8")


def test_a_number_addresses_a_list_item_and_a_mapping_is_made_where_there_is_none(write):
    path = str(write(changed("      roles:\n        lm_head: int8\n", "")))
    recipe = load_recipe(path, ("passes.0.quantize.roles.lm_head=none",)).recipe
    assert recipe.passes[0].options.roles == {"lm_head": "none"}


def test_an_override_takes_a_list_or_a_mapping_in_brackets(write):
    recipe = load_recipe(str(write()), ("check.prompts=[heldout, recall]", "check.limits={top1_agreement: 0.5}")).recipe
    assert recipe.check.prompts == ("heldout", "recall")
    assert recipe.check.limits == {"top1_agreement": 0.5}


def test_a_later_override_sees_an_earlier_one(write):
    recipe = load_recipe(str(write()), ("check=null", "check.samples=3")).recipe
    assert (recipe.check.samples, recipe.check.limits) == (3, {})


@pytest.mark.parametrize("override", ["check=null", "check="])
def test_an_override_switches_the_check_off(write, override):
    assert load_recipe(str(write()), (override,)).recipe.check is None


BAD_OVERRIDES = {
    "check": "KEY=VALUE",
    "=1": "KEY=VALUE",
    "passes.1.quantize.weights=none": "no item '1'",
    "passes.-1.quantize.weights=none": "no item '-1'",
    "passes.first.quantize.weights=none": "no item 'first'",
    "passes.².quantize.weights=none": "no item '²'",
    "passes.0.quantize.wieghts=none": "did you mean 'weights'?",
    "passes.0.quantize.weights=nine": "did you mean 'none'?",
    "passes.0.quantize.roles.norm=int8": "'norm'",
    "chek=null": "did you mean 'check'?",
    "chek.samples=1": "did you mean 'check'?",
    "check.samples=0": "check.samples",
    "check.samples.x=1": "plain value",
    "check.prompts.0.x=1": "plain value",
    "check.prompts.0=prose": "'prose'",
    "check.limits.perplexity_ratoi=1": "did you mean 'perplexity_ratio'?",
    "model.name=x": "plain value",
    "check={": "not valid YAML",
    "check=*anchor": "anchors and aliases",
    "model=!!python/name:os.system x": "YAML tag",
    "version=2": "version",
}


@pytest.mark.parametrize(("override", "said"), BAD_OVERRIDES.items(), ids=list(BAD_OVERRIDES))
def test_a_bad_override_is_refused_as_an_override_and_not_blamed_on_the_file(write, override, said):
    message = refusal(write(), override)
    assert message.startswith("--set")
    assert said in message


def options_of(recipe) -> tuple:
    """Everything a recipe decides, with the options spelt out."""
    return (
        recipe.version,
        recipe.model,
        [(step.name, step.options) for step in recipe.passes],
        [(step.name, step.options) for step in recipe.export],
        recipe.check,
    )


ROUND_TRIPS = {
    "as written": (),
    "check off": ("check=null",),
    "no export": ("export=[]",),
    "defaults of an exporter": ("export.0.onnx=null",),
    "defaults of a pass": ("passes.0.quantize=null",),
    "no limits": ("check.limits={}",),
    "a model with odd characters": ("model='a: b # ü'",),
    "no model": ("model=null",),
}


@pytest.mark.parametrize("overrides", ROUND_TRIPS.values(), ids=list(ROUND_TRIPS))
def test_the_resolved_recipe_loads_again_as_the_same_recipe(write, tmp_path, overrides):
    loaded = load_recipe(str(write()), overrides)
    resolved = tmp_path / "recipe.resolved.yaml"
    resolved.write_text(loaded.resolved_yaml(), encoding="utf-8")
    again = load_recipe(str(resolved))
    assert options_of(again.recipe) == options_of(loaded.recipe)
    assert again.resolved_yaml() == loaded.resolved_yaml()


def test_the_resolved_recipe_spells_out_defaults_and_overrides(write):
    resolved = load_recipe(str(write("version: 1\npasses: [quantize: {}]\ncheck: {}\n")), ("model=x",)).resolved_yaml()
    for words in ("method: rtn", "weights: int8", "samples:", "length:", "model: x"):
        assert words in resolved


def test_the_text_of_a_recipe_is_kept_with_its_comments(write):
    text = "# why this recipe is here\n" + RECIPE
    assert load_recipe(str(write(text)), ("check=null",)).text == text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("activation_roles: {lm_head: static-int8}, roles: {lm_head: none}", "lm_head"),
        ("activation_roles: {ssm_out: dynamic-fp8}, weights: bf16", "ssm_out"),
        ("activations: static-int8, rotate: [mlp], roles: {mlp: fp16}", "mlp"),
        ("activation_roles: {embedding: dynamic-int8}", "embedding"),
        ("method: gptq, weights: none", "nothing"),
        ("activations: dynamic-int8, weights: bf16", "nothing"),
        ("overrides: [{role: mlp, layers: [99], weights: int8}]", "overrides.0"),
        ("overrides: [{role: experts, projections: [down], weights: int8}]", "overrides.0"),
    ],
)
def test_what_is_named_but_would_do_nothing_is_refused(tmp_path, tiny, options, named):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\npasses:\n  - quantize: {{{options}}}\n")
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(tiny)), tmp_path / "out")
    message = refusals.refusal(lambda: pipeline.prepare(job))
    assert f"'{named}'" in message or named in message


def test_an_override_wins_over_its_role_for_the_matrices_it_covers(tmp_path, tiny):
    recipe = tmp_path / "recipe.yaml"
    override = "{role: experts, layers: [3], projections: [down_proj], weights: int8-g32}"
    recipe.write_text(
        f"version: 1\npasses:\n  - quantize: {{weights: none, roles: {{experts: int4-g32}}, overrides: [{override}]}}\n"
    )
    planned = pipeline.prepare(pipeline.Job(load_recipe(str(recipe)), resolve(str(tiny)), tmp_path / "out"))
    formats = {w.name: w.format for unit in planned.units for w in unit.weights.values() if w.is_quantized}
    covered = {f"model.layers.3.feed_forward.experts.{e}.down_proj.weight" for e in range(8)}
    assert {name for name, used in formats.items() if used == "int8-g32"} == covered
    assert {used for name, used in formats.items() if name not in covered} == {"int4-g32"}


def test_a_matrix_is_quantized_once(tmp_path, tiny):
    recipe = tmp_path / "recipe.yaml"
    first = "quantize: {method: gptq, weights: none, roles: {experts: int4-g32}}"
    recipe.write_text(f"version: 1\npasses:\n  - {first}\n  - quantize: {{weights: int8}}\n")
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(tiny)), tmp_path / "out")
    message = refusals.refusal(lambda: pipeline.prepare(job))
    assert "experts" in message and "earlier pass" in message
    recipe.write_text(recipe.read_text().replace("{weights: int8}", "{weights: int8, roles: {experts: none}}"))
    assert pipeline.prepare(pipeline.Job(load_recipe(str(recipe)), resolve(str(tiny)), tmp_path / "out")).units


def test_an_override_of_a_role_that_stays_names_its_place(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses:\n  - quantize:\n      overrides:\n        - {role: norm, weights: int8}\n")
    message = refusals.refusal(lambda: load_recipe(str(recipe)))
    assert "recipe.yaml:5" in message and "overrides.0.role" in message


def test_a_misspelt_calibration_prompt_is_answered_with_what_calibration_takes(tmp_path, tiny):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\ncalibration: {prompts: [prosa]}\npasses:\n  - quantize: {method: gptq}\n")
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(tiny)), tmp_path / "out")
    message = refusals.refusal(lambda: pipeline.prepare(job))
    assert "prose" in message and "heldout" not in message


# ---- prune_experts: what is refused before a weight is read


def config_of(folder: Path, **changes) -> Path:
    """A folder that holds the configuration of a model with eight experts in layers 1 and 4, and no weights."""
    config = {**AWKWARD, "model_type": "jamba", "num_experts": 8, "dtype": "bfloat16", **changes}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refused_by_the_command(compress_cli, tmp_path: Path, passes: str, **changes) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\ncalibration: {{prompts: [self]}}\npasses:\n{passes}")
    model = config_of(tmp_path / "model", **changes)
    result = compress_cli("apply", recipe, "-m", model, "-o", tmp_path / "out", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


@pytest.mark.parametrize("amount", ["keep: 7", "keep: 2", "fraction: 0.125", "fraction: 0.75", "budget: 0.0625",
                                    "budget: 0.75", "budget: 0.7, keep: null"])  # fmt: skip
def test_an_amount_that_a_model_can_spare_is_planned(compress_cli, tmp_path, amount):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\ncalibration: {{prompts: [self]}}\npasses:\n  - prune_experts: {{{amount}}}\n")
    model = config_of(tmp_path / "model")
    result = compress_cli("apply", recipe, "-m", model, "-o", tmp_path / "out", "--dry-run")
    assert result.exit_code == 0, result.output


AMOUNTS = {
    "more than there are": ("keep: 9", {}, ["keep is 9", "8 experts"]),
    "all that there are": ("keep: 8", {}, ["keep 8", "removes none of 8"]),
    "fewer than a token goes to": ("keep: 1", {}, ["keep 1 of 8", "2 must stay"]),
    "a single one": ("keep: 1", {"num_experts_per_tok": 1}, ["keep 1 of 8", "2 must stay"]),
    "fewer than three a token": ("keep: 2", {"num_experts_per_tok": 3}, ["keep 2 of 8", "3 must stay"]),
    "none to keep": ("keep: 0", {}, ["keep"]),
    "a number that is not whole": ("keep: 2.5", {}, ["keep"]),
    "yes": ("keep: yes", {}, ["keep"]),
    "no share": ("fraction: 0", {}, ["fraction"]),
    "everything": ("fraction: 1", {}, ["fraction"]),
    "more than everything": ("fraction: 1.5", {}, ["fraction"]),
    "less than nothing": ("fraction: -0.1", {}, ["fraction"]),
    "a share that is no number": ("fraction: .nan", {}, ["fraction"]),
    "a share of less than one expert": ("fraction: 0.12", {}, ["fraction 0.12", "none of 8"]),
    "a share that leaves too few": ("fraction: 0.8", {}, ["keep 2 of 8", "3 must stay"]),
    "a budget of everything": ("budget: 1", {}, ["budget"]),
    "a budget of nothing": ("budget: 0", {}, ["budget"]),
    "a budget of less than one expert": ("budget: 0.06", {}, ["budget 0.06", "none of 16"]),
    "a budget that leaves too few": ("budget: 0.82", {}, ["keep 1 of 8", "2 must stay"]),
    "two amounts": ("keep: 6, budget: 0.2", {}, ["exactly one", "keep and budget"]),
    "three amounts": ("keep: 6, fraction: 0.2, budget: 0.2", {}, ["exactly one"]),
    "nothing at all": (None, {}, ["exactly one of keep, fraction, budget"]),
    "no amount": ("method: reap", {}, ["exactly one of keep, fraction, budget"]),
    "an unknown method": ("keep: 6, method: reep", {}, ["'reep'", "reap"]),
    "an unknown router": ("keep: 6, router: keep_row", {}, ["'keep_row'", "keep_rows"]),
    "an unknown key": ("keep: 6, recovry: none", {}, ["recovry", "recovery"]),
    "no damping": ("keep: 6, damping: 0", {}, ["damping"]),
    "a dense model": ("keep: 2", {"num_experts": 1}, ["no experts"]),
    "a model whose layers differ": (
        "keep: 2", {"compress": {"num_experts_per_layer": [1, 8, 1, 1, 5, 1]}}, ["pruned before"]),
    "a model whose routers kept rows": ("keep: 2", {"compress": {"router_rows": 11}}, ["pruned before"]),
}  # fmt: skip
AMOUNTS["a share that leaves too few"][1]["num_experts_per_tok"] = 3


@pytest.mark.parametrize(("block", "model", "words"), AMOUNTS.values(), ids=list(AMOUNTS))
def test_an_amount_that_makes_no_sense_is_refused_without_weights(compress_cli, tmp_path, block, model, words):
    given = "" if block is None else f" {{{block}}}"
    message = refused_by_the_command(compress_cli, tmp_path, f"  - prune_experts:{given}\n", **model)
    assert all(word in message for word in words), message


def test_experts_that_an_earlier_pass_quantizes_are_not_pruned(compress_cli, tmp_path):
    passes = "  - quantize: {weights: int8}\n  - prune_experts: {keep: 6}\n"
    assert "prune_experts must come before the quantize" in refused_by_the_command(compress_cli, tmp_path, passes)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (("keep: 7", "budget: 0.3"), "passes.1.prune_experts surveys the model as it came: it must be the first pass"),
        (("budget: 0.25", "keep: 5"), "passes.1.prune_experts cannot follow a pass that shares a budget among layers"),
    ],
)
def test_a_budget_is_for_one_pass_that_comes_first(compress_cli, tmp_path, blocks, words):
    passes = "".join(f"  - prune_experts: {{{block}}}\n" for block in blocks)
    assert words in refused_by_the_command(compress_cli, tmp_path, passes)


def test_experts_of_a_model_that_is_quantized_already_are_not_pruned(tmp_path, applied):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\npasses:\n  - prune_experts: {keep: 6}\n")
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(applied / "checkpoint")), tmp_path / "out")
    assert "quantized" in refusals.refusal(lambda: pipeline.prepare(job))


def test_experts_of_several_types_are_not_pruned(tmp_path, small):
    model = tmp_path / "model"
    shutil.copytree(small, model)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.4.feed_forward.experts.1.up_proj.weight"
    save_file(tensors | {name: tensors[name].float()}, model / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\ncalibration: {prompts: [self]}\npasses:\n  - prune_experts: {keep: 2}\n")
    job = pipeline.Job(load_recipe(str(recipe)), resolve(str(model)), tmp_path / "out")
    message = refusals.refusal(lambda: pipeline.prepare(job))
    assert "bf16, fp32" in message
