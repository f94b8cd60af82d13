"""Passes and exporters that others write: the documented examples run, a broken file is refused in one sentence and breaks
nothing else, and what a pass says of itself reaches the report whatever it looks like."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from jamba_models import make_jamba
from plugged import Plugged
from refusals import refusal, refusal_of_command
from safetensors.torch import load_file

import compress
from compress.apply import pipeline
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

HEAD = """from compress.passes import Pass
from compress.strict.models import Strict

class Options(Strict):
    pass
"""
PASS = HEAD + "\nclass Mine(Pass[Options]):\n    def apply(self, unit, context):\n        return unit\n"
EXPORTER = """from compress.strict.models import Strict
from exporters import Exported, Exporter

class Options(Strict):
    pass

class Mine(Exporter[Options]):
    def predict_bytes(self, units): return 0
    def export(self, checkpoint, folder, advance): pass
"""
BROKEN_PASSES = {
    "a syntax error": ("class Mine(:\n", "SyntaxError"),
    "an import that fails": ("import nowhere_to_be_found\n", "nowhere_to_be_found"),
    "an error while it is imported": ("1 / 0\n", "ZeroDivisionError"),
    "an end of the process": ("raise SystemExit(0)\n", "it ends the process"),
    "no class": ("x = 1\n", "expected one class that inherits from Pass, found none"),
    "a class it only imports": ("from compress.passes.quantize import Quantize\n", "found none"),
    "two classes": (PASS + PASS.replace("Mine", "Other").removeprefix(HEAD), "found Mine, Other"),
    "a misspelt hook": (
        PASS + "    need_calibration = True\n",
        "Mine.need_calibration is no hook of Pass; did you mean 'needs_calibration'?",
    ),
    "a hook that does nothing alone": (
        PASS + "    def calibrate(self, unit, inputs, context):\n        return unit, {}\n",
        "defines calibrate, which does nothing without needs_calibration",
    ),
    "the other way round": (PASS + "    needs_survey = True\n", "does nothing without survey"),
    "one that has nothing to settle": (
        PASS + "    def settle(self, finished, context):\n        return self.options, {}\n",
        "defines settle, which does nothing without needs_settling",
    ),
    "a method where a value is asked": (
        PASS
        + "    def needs_survey(self):\n        return False\n    def survey(self, layers, context):\n        return {}\n",
        "Mine.needs_survey must be a property or a value, not a method",
    ),
    "a value where a method is asked": (PASS + "    details = {}\n", "Mine.details must be a method"),
    "other arguments": (
        PASS.replace("unit, context", "unit"),
        "Mine.apply takes (self, unit), but is given (self, unit, context)",
    ),
    "no apply": (HEAD + "class Mine(Pass[Options]):\n    pass\n", "Mine lacks apply"),
    "no options": (HEAD + "class Mine(Pass):\n    def apply(self, unit, context): ...\n", "names no options"),
    "options of another kind": (
        PASS.replace("Pass[Options]", "Pass[dict]"),
        "names no options: expected class Mine(Pass[Options]), Options being a Strict model",
    ),
}
BROKEN_EXPORTERS = {
    "no describe": (EXPORTER, "Mine lacks describe"),
    "a hook that does nothing alone": (EXPORTER + "    needs_ranges = True\n", "does nothing without fitted"),
    "a misspelt hook": (
        EXPORTER + "    def describes(self, folder): ...\n",
        "Mine.describes is no hook of Exporter; did you mean 'describe'?",
    ),
    "an error while it is imported": ("raise OSError('gone')\n", "OSError: gone"),
}


@pytest.fixture
def plugged(tmp_path, monkeypatch):
    found = Plugged(tmp_path, monkeypatch)
    yield found
    found.remove()


@pytest.fixture
def recipe(tmp_path):
    def write(passes: str = "", export: str = "", more: str = ""):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"version: 1\npasses: [{passes}]\nexport: [{export}]\n{more}")
        return path

    return write


@pytest.fixture
def run(recipe, tmp_path):
    """Applies a recipe to a model, and returns the output folder."""

    def run(model, passes: str, export: str = "", more: str = ""):
        loaded = load_recipe(str(recipe(passes, export, more)))
        pipeline.apply(pipeline.Job(loaded, resolve(str(model)), tmp_path / "out"))
        return tmp_path / "out"

    return run


def tensors_in(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def report_of(out):
    return json.loads((out / "report.json").read_text())


# ---- broken files


@pytest.mark.parametrize("name", BROKEN_PASSES)
def test_a_broken_pass_is_refused_by_file_where_it_is_used_and_nowhere_else(compress_cli, plugged, recipe, name):
    text, said = BROKEN_PASSES[name]
    file = plugged.add("passes", "mine", text)
    message = refusal(lambda: load_recipe(str(recipe("mine: {}"))))
    assert message.startswith(f"{file}: ")
    assert said in message
    assert load_recipe(str(recipe("quantize: {}"))).recipe.passes[0].name == "quantize"
    assert compress_cli("apply", "tiny-int8", "--dry-run", "--set", "export=[]").exit_code == 0
    assert compress_cli("recipes").exit_code == compress_cli("apply", "--help").exit_code == 0


def test_a_broken_pass_ends_the_command_with_one_sentence(compress_cli, plugged, recipe, tmp_path, small):
    file = plugged.add("passes", "mine", "def broken(:\n")
    result = compress_cli("apply", recipe("mine: {}"), "-m", small, "-o", tmp_path / "out")
    assert str(file) in refusal_of_command(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", BROKEN_EXPORTERS)
def test_a_broken_exporter_is_refused_by_file_where_it_is_used(compress_cli, plugged, recipe, applied, name):
    text, said = BROKEN_EXPORTERS[name]
    file = plugged.add("exporters", "mine", text)
    message = refusal(lambda: load_recipe(str(recipe(export="mine: {}"))))
    assert message.startswith(f"{file}: ")
    assert said in message
    assert said in refusal_of_command(compress_cli("export", applied, "--to", "mine"))
    assert load_recipe("tiny-int8").recipe.export[0].name == "onnx"


def test_one_loader_names_the_exporters():
    folder = Path(compress.__file__).parent
    named = re.compile(r"^\s*(from|import) exporters\b|[\"']exporters[\"'.]", re.MULTILINE)
    assert [path.name for path in folder.rglob("*.py") if named.search(path.read_text())] == ["plugins.py"]


def test_a_file_that_is_mended_is_loaded(plugged, recipe):
    plugged.add("passes", "mine", "import nowhere_to_be_found\n")
    refusal(lambda: load_recipe(str(recipe("mine: {}"))))
    plugged.add("passes", "mine", PASS)
    assert load_recipe(str(recipe("mine: {}"))).recipe.passes[0].name == "mine"


def test_helpers_of_a_file_are_no_hooks(plugged, recipe):
    helpers = "    def _helped(self): ...\n    _mine = 3\n\nclass _Base(Pass[Options]): ...\n"
    plugged.add("passes", "mine", PASS + helpers)
    assert load_recipe(str(recipe("mine: {}"))).recipe.passes[0].name == "mine"


def test_the_options_of_a_file_are_validated_as_those_of_ours(plugged, recipe):
    plugged.add("passes", "mine", PASS.replace("    pass\n", "    strength: float = 1\n"))
    path = recipe("mine: {strenght: 2}")
    assert refusal(lambda: load_recipe(str(path))) == f"{path}:2: unknown key 'strenght'; did you mean 'strength'?"
    path = recipe("mine: {strength: much}")
    assert refusal(lambda: load_recipe(str(path))).startswith(f"{path}:2: passes.0.mine.strength: ")
    assert load_recipe(str(recipe("mine: ")), ("passes.0.mine.strength=3",)).recipe.passes[0].options.strength == 3
    assert "did you mean 'mine'?" in refusal(lambda: load_recipe(str(recipe("mines: {}"))))


# ---- what a pass says of itself

STRANGE = {
    "layers": [{"anything": 1}, 3, None],
    "formats": "not a mapping",
    "method": {"of": ["several", {"kinds": 0.5}]},
    "experts": 4,
    "notes": {"of": "its own"},
    "nothing": None,
    "share": 1e-12,
    "infinite": float("inf"),
    "<b>`markup`</b> |": "``` | <script> \n# heading",
    "many": list(range(5000)),
    "a tuple": (1, {2}),
    "wide": {str(number): number for number in range(500)},
    "things": {1: torch.float32, (2, 3): [float("nan")]},
}


def test_details_of_any_shape_reach_the_report(plugged, run, small):
    text = f"{PASS}\n    def details(self, units, notes):\n        return STRANGE\n"
    plugged.add("passes", "mine", text.replace(HEAD, f"import torch\n{HEAD}\nSTRANGE = {STRANGE!r}\n")
                .replace("inf,", "float('inf'),").replace("[nan]", "[float('nan')]"))  # fmt: skip
    out = run(small, "mine: {}")
    (entry,) = report_of(out)["passes"]
    details = entry["details"]
    assert details.pop("layers_reused") == 0
    assert details.keys() == STRANGE.keys()
    assert details["many"] == STRANGE["many"]
    assert details["layers"] == STRANGE["layers"]
    assert details["infinite"] is None
    assert details["things"] == {"1": "torch.float32", "(2, 3)": [None]}
    shown = (out / "report.md").read_text()
    block = re.search(r"^  (`{3,})yaml\n(.*?)^  \1$", shown, re.DOTALL | re.MULTILINE)[2]
    told = yaml.safe_load(block)
    assert told.keys() == STRANGE.keys()
    assert told["many"] == [*range(12), "and 4988 more, in report.json"]
    assert told["wide"] == {str(n): n for n in range(12)} | {"and more": "488 more, in report.json"}
    assert told["method"] == STRANGE["method"]
    assert told["notes"] == STRANGE["notes"]
    assert told["<b>`markup`</b> |"] == STRANGE["<b>`markup`</b> |"]
    assert "<script>" not in shown.replace(block, "")
    assert "<summary>Versions</summary>" in shown


@pytest.mark.parametrize(
    ("hook", "shown"),
    [
        ("details(self, units, notes):\n        return [3, 'of them']", "  details:\n  - 3\n  - of them\n"),
        ("details(self, units, notes):\n        return None", "MiB.\n"),
        ("sentences(self, details):\n        return 'It is done.'", "MiB. It is done.\n"),
        ("sentences(self, details):\n        return None", "MiB.\n"),
    ],
)
def test_what_a_pass_says_in_another_form_is_not_lost(plugged, run, small, hook, shown):
    plugged.add("passes", "mine", f"{PASS}\n    def {hook}\n")
    assert shown in (run(small, "mine: {}") / "report.md").read_text()


def test_an_error_in_a_hook_names_it_and_its_file(compress_cli, plugged, recipe, tmp_path, small):
    file = plugged.add("passes", "mine", f"{PASS}\n    def details(self, units, notes):\n        return notes[7]\n")
    result = compress_cli("apply", recipe("mine: {}"), "-m", small, "-o", tmp_path / "out")
    said = refusal_of_command(result, code=3)
    assert said.startswith(f"compress: internal error in Mine.details ({file}), IndexError: ")
    plugged.remove()
    file.write_text(PASS)
    assert compress_cli("apply", recipe("mine: {}"), "-m", small, "-o", tmp_path / "out", "--resume").exit_code == 0


def test_what_a_pass_speaks_for_is_not_shown_twice(plugged, run, small):
    plugged.add("passes", "mine", PASS + """
    spoken_for = frozenset({"said"})

    def details(self, units, notes):
        return {"said": len(units), "unsaid": 7}

    def sentences(self, details):
        return [f"It saw {details['said']} units.", "And a line below."]
""")  # fmt: skip
    shown = (run(small, "mine: {}") / "report.md").read_text()
    assert re.search(r"- mine: [\d.]+ s, peak \d+ MiB\. It saw 8 units\.\n  - And a line below\.\n", shown)
    assert "unsaid: 7" in shown
    assert "said: 8" not in shown.replace("unsaid", "")


def test_facts_and_coverage_are_those_of_the_pass(compress_cli, plugged, recipe, tmp_path, small):
    text = (
        PASS.replace("import Pass", "import Coverage, Fact, Pass")
        + """
    needs_calibration = True

    def calibrate(self, unit, inputs, context):
        return unit, {"seen": 5}

    def changes(self, before, after, found):
        return (Fact("colour", "The model is now green."),)

    def details(self, units, notes):
        return {"seen": [note["seen"] for note in notes]}

    def coverage(self, details):
        return Coverage(min(details["seen"]), ("layer 1 expert 0",), "were painted twice")
"""
    )
    plugged.add("passes", "mine", text)
    (tmp_path / "text.txt").write_text("some words of text " * 200)
    tiny = recipe("mine: {}", more="calibration: {prompts: [self], samples: 4, length: 16}\n")
    assert "colour    The model is now green." in compress_cli("apply", tiny, "-m", small, "--dry-run").stdout
    result = compress_cli("apply", tiny, "-m", small, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "1 experts were painted twice" in result.stdout
    report = report_of(tmp_path / "out")
    assert report["calibration"]["expert_coverage"] == {
        "min_tokens": 5, "experts_below_threshold": ["layer 1 expert 0"], "below_threshold": "were painted twice",
    }  # fmt: skip
    assert report["artifacts"][0]["notes"] == ["The model is now green."]
    assert "The model is now green." in (tmp_path / "out" / "checkpoint" / "README.md").read_text()


# ---- the examples of docs/architecture.md


def test_the_example_cast_stores_roles_in_another_type_and_says_so(compress_cli, plugged, recipe, run, small):
    plugged.add_example("passes", "cast")
    before, out = tensors_in(small), run(small, "cast: {to: fp32, roles: [ssm_a, ssm_d]}")
    changed = {name for name in before if name.endswith(("A_log", ".D"))}
    for name, tensor in tensors_in(out / "checkpoint").items():
        assert tensor.dtype == (torch.float32 if name in changed else torch.bfloat16)
        assert torch.equal(tensor.float(), before[name].float())
    assert f"{len(changed)} tensors are stored as fp32." in (out / "report.md").read_text()
    assert "yaml" not in (out / "report.md").read_text()
    dense = make_jamba(out.parent / "dense", attn_layer_period=1, attn_layer_offset=0, num_hidden_layers=2)
    refused = compress_cli("apply", recipe("cast: {to: fp32, roles: [ssm_a]}"), "-m", dense)
    assert "cast.roles names 'ssm_a', but the model has no such tensors" in refusal_of_command(refused)


def test_the_example_silence_is_calibrated_before_gptq(plugged, run, small):
    plugged.add_example("passes", "silence")
    calibration = "calibration: {prompts: [self], samples: 4, length: 16}\n"
    out = run(small, "silence: {below: 1}, quantize: {method: gptq}", more=calibration)
    silenced = report_of(out)["passes"][0]["details"]["silenced"]
    stored = tensors_in(out / "checkpoint")
    assert silenced
    for entry in silenced:
        assert "silenced" in (out / "report.md").read_text()
        assert entry["inputs"] > 0
        assert entry["matrix"] in stored or entry["matrix"] + "_packed" in stored
    records = json.loads((out / "checkpoint" / "config.json").read_text())["compress"]["passes"]
    assert records[0] == {"name": "silence"}, "what it did is not told"


def test_the_example_dense_writes_a_checkpoint_that_is_described(compress_cli, plugged, run, small):
    plugged.add_example("exporters", "dense")
    out = run(small, "quantize: {weights: fp16}", "dense: {}")
    stored, dense = tensors_in(out / "checkpoint"), tensors_in(out / "dense")
    assert all(torch.equal(dense[name], stored[name].bfloat16()) for name in stored)
    artifact = report_of(out)["artifacts"][1]
    assert artifact["weight_bytes"] == sum(2 * tensor.numel() for tensor in dense.values())
    result = compress_cli("export", out, "--to", "dense", "-o", out.parent / "again")
    assert result.exit_code == 0, result.stderr
    assert tensors_in(out.parent / "again").keys() == dense.keys()
