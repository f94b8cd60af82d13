"""The GitHub Action: its scripts are run as GitHub runs them, with inputs as environment variables and a file for outputs."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from compress.apply import pipeline
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

ROOT = Path(__file__).resolve().parents[1]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
STEPS = ACTION["runs"]["steps"]
EXPRESSION = re.compile(r"\$\{\{ (.*?) \}\}")


@dataclass
class Runner:
    """Enough of GitHub's runner for the steps that are scripts: contexts, outputs, and `python` on the path."""

    folder: Path
    stands_in: bool = False
    outputs: dict[str, str] = field(default_factory=dict)

    def context(self, inputs: dict[str, str]) -> dict[str, str]:
        given = {name: described.get("default", "") for name, described in ACTION["inputs"].items()} | inputs
        known = {f"inputs.{name}": value for name, value in given.items()}
        return known | {"runner.temp": str(self.folder / "temp")} | self.outputs

    def run(self, number: int, inputs: dict[str, str]) -> subprocess.CompletedProcess:
        step, known = STEPS[number], self.context(inputs)
        written = self.folder / "github_output"
        written.write_text("")
        environment = {name: EXPRESSION.sub(lambda found: known[found[1]], text) for name, text in step["env"].items()}
        ran = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], capture_output=True, text=True,
            check=False, cwd=self.folder, env=self._environment(written) | environment,
        )  # fmt: skip
        for line in written.read_text().splitlines():
            name, _, value = line.partition("=")
            self.outputs[f"steps.{step.get('id')}.outputs.{name}"] = value
        return ran

    def _environment(self, written: Path) -> dict[str, str]:
        tools = self.folder / "tools"
        tools.mkdir(exist_ok=True)
        stand_in = [str(ROOT / "tests" / "stand_in.py")] if self.stands_in else []
        (tools / "python").write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, *stand_in])} "$@"\n')
        (tools / "python").chmod(0o755)
        path = f"{tools}:{os.environ['PATH']}"
        own = {"GITHUB_OUTPUT": str(written), "GITHUB_ACTION_PATH": str(ROOT)}
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **own}


@pytest.fixture
def runner(tmp_path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture(scope="module")
def int8(small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "out"
    pipeline.apply(pipeline.Job(load_recipe("tiny-int8", ("check=null", "export=[]")), resolve(str(small)), out))
    return out


def place(step_id: str) -> int:
    return next(number for number, step in enumerate(STEPS) if step.get("id") == step_id)


def gate(runner: Runner, **inputs: str) -> tuple[subprocess.CompletedProcess, dict[str, str]]:
    """The named cache, then the command: what it said, and the action's outputs."""
    given = {name.replace("_", "-"): value for name, value in inputs.items()}
    runner.outputs.clear()
    runner.run(place("begin"), given)
    ran = runner.run(place("run"), given)
    known = runner.context(given)
    return ran, {
        name: EXPRESSION.sub(lambda found: known.get(found[1], ""), output["value"])
        for name, output in ACTION["outputs"].items()
    }


# --- what stands in the file


def test_no_script_has_an_expression_in_it():
    """GitHub would paste its value into the script, where it is run."""
    assert [step["run"] for step in STEPS if "${{" in step.get("run", "")] == []


def test_every_input_is_used_and_every_expression_is_of_something():
    used = {
        name
        for text in EXPRESSION.findall(yaml.safe_dump(STEPS, width=10_000))
        for name in re.findall(r"inputs\.([\w-]+)", text)
    }
    assert used == set(ACTION["inputs"])
    text = yaml.safe_dump(ACTION, width=10_000)
    scripts = {step["id"]: step.get("run", "") for step in STEPS if "id" in step}
    for step, output in re.findall(r"steps\.(\w+)\.outputs\.([\w-]+)", text):
        told = output in scripts[step] or (step, output) == ("restore", "cache-matched-key")
        assert told, f"steps.{step}.outputs.{output}"


def test_a_cache_is_saved_and_a_report_uploaded_where_the_gate_failed():
    after = STEPS[place("run") + 1 :]
    assert [step["uses"].split("@")[0] for step in after] == ["actions/cache/save", "actions/upload-artifact"]
    assert all("!cancelled()" in step["if"] for step in after), (
        "without it a step runs only where all before it did well"
    )


def test_the_cache_is_restored_and_saved_from_where_the_command_keeps_it():
    paths = {step["with"]["path"] for step in STEPS if step.get("uses", "").startswith("actions/cache/")}
    assert paths == {STEPS[place("run")]["env"]["COMPRESS_CACHE"]}


# --- what docs/ci.md shows


def examples() -> list:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]


def test_the_examples_for_github_give_inputs_that_there_are():
    whole, steps, _ = examples()
    used = [step for step in (*whole["jobs"]["compress"]["steps"], *steps) if step.get("uses", "").startswith("OWNER/")]
    assert len(used) == 2
    assert all(step["with"].keys() <= ACTION["inputs"].keys() for step in used)


def test_the_table_of_inputs_has_all_of_them():
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "docs" / "ci.md").read_text(encoding="utf-8"), re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([a-z-]+)`", row)}
    assert told >= set(ACTION["inputs"])


def test_the_example_for_gitlab_keeps_the_cache_and_what_the_command_writes(applied):
    (job,) = examples()[2].values()
    cache = job["variables"]["COMPRESS_CACHE"].removeprefix("$CI_PROJECT_DIR/")
    assert job["cache"]["paths"] == [f"{cache}/"]
    assert job["cache"]["when"] == job["artifacts"]["when"] == "always"
    kept = [*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]]
    assert {Path(path).parent.as_posix() for path in kept} == {shlex.split(job["script"][0])[-2]}
    assert {Path(path).name for path in kept} <= {path.name for path in applied.iterdir()}


# --- the command itself


def test_a_missed_limit_fails_the_step_after_the_outputs_are_told(runner, small, int8):
    args = "--prompts\nself\n--samples\n2\n--length\n12\n--no-audit"
    limits = runner.folder / "limits of ours.yaml"
    limits.write_text("perplexity_ratio: 0.01\n")
    given = {"baseline": str(small), "candidate": str(int8), "limits": limits.name, "output": "a report/here"}
    ran, outputs = gate(runner, args=args, **given)
    assert ran.returncode == 1, ran.stderr
    assert "::error title=compress::verdict: fail" in ran.stdout
    report = runner.folder / "a report" / "here"
    assert outputs == {"verdict": "fail", "exit-code": "1", "report": str(report)}
    assert {path.name for path in report.iterdir()} == {"check.json", "report.html", "junit.xml"}
    assert json.loads((report / "check.json").read_text())["verdict"] == "fail"


def test_a_recipe_is_applied_with_what_is_set(runner, small):
    settings = (
        "check.prompts=[self]\ncheck.samples=2\ncheck.length=12\n\nexport=[]\ncheck.limits={kl_divergence_mean: 5}"
    )
    ran, outputs = gate(runner, recipe="tiny-int8", model=str(small), set=settings, args="--seed\n3")
    assert ran.returncode == 0, ran.stderr
    out = runner.folder / "out" / "tiny-int8"
    assert outputs == {"verdict": "pass", "exit-code": "0", "report": str(out)}
    report = json.loads((out / "report.json").read_text())
    assert {row["limit"] for row in report["checks"]} == {5, None}


# --- with a stand-in for the command: what it is given, and what becomes of how it ends


@pytest.fixture
def quick(tmp_path) -> Runner:
    return Runner(tmp_path, stands_in=True)


def given(runner: Runner) -> list[str] | None:
    """The arguments of the command, None where it was not run."""
    seen = runner.folder / "arguments.json"
    return json.loads(seen.read_text()) if seen.exists() else None


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        ({"baseline": "a", "candidate": "b c"},
         "check --json R/check.json --html R/report.html --junit R/junit.xml -- a 'b c'"),
        ({"baseline": "a", "candidate": "b", "limits": "default", "args": "--prompts\nmy file.txt\n"},
         "check --prompts 'my file.txt' --limits default --json R/check.json --html R/report.html --junit R/junit.xml -- a b"),
        ({"recipe": "r/own.recipe.yaml", "set": "a.b=1 2\n\nc=[x, y]\n"},
         "apply --set 'a.b=1 2' --set 'c=[x, y]' --output out/own.recipe --overwrite -- r/own.recipe.yaml"),
        ({"recipe": "int8", "model": "m", "limits": "default", "output": "o", "args": "--seed\n1"},
         "apply --seed 1 --model m --set check.limits=default --output o --overwrite -- int8"),
    ],
)  # fmt: skip
def test_inputs_become_arguments(quick, inputs, arguments):
    gate(quick, **inputs)
    assert given(quick) == shlex.split(arguments.replace("R/", "compress-report/"))


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [("", ["install", "-c", f"{ROOT}/constraints.txt", "--", str(ROOT)]), ("a b.whl", ["install", "--", "a b.whl"]),
     ("--index-url=x", ["install", "--", "--index-url=x"])],
)  # fmt: skip
def test_the_checkout_is_installed_or_what_is_asked_for(quick, asked, arguments):
    (number,) = (number for number, step in enumerate(STEPS) if step.get("name") == "Install compress")
    ran = quick.run(number, {"install": asked})
    assert ran.returncode == 0, ran.stderr
    assert given(quick) == arguments


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "give either recipe, or baseline and candidate"),
        ({"baseline": "a"}, "give either recipe"),
        ({"recipe": "tiny-int8", "candidate": "b"}, "give either recipe"),
        ({"recipe": "tiny-int8", "limits": "limits.yaml"}, "stand in the recipe"),
        ({"baseline": "a", "candidate": "b", "set": "x=1"}, "for a recipe"),
        ({"baseline": "a", "candidate": "b", "model": "x"}, "for a recipe"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(quick, inputs, said):
    ran, outputs = gate(quick, **inputs)
    assert (ran.returncode, given(quick)) == (2, None)
    assert said in ran.stdout
    assert outputs == {"verdict": "none", "exit-code": "2", "report": ""}


@pytest.mark.parametrize("text", ["$(touch pwned)", '"; touch pwned; "', "`touch pwned`", "--help", "$HOME *"])
@pytest.mark.parametrize(
    "names", [("baseline", "candidate", "limits", "output", "cache_name"), ("recipe", "model", "set")]
)
def test_an_input_is_never_run_nor_taken_for_an_option(quick, text, names):
    ran, _ = gate(quick, **dict.fromkeys(names, text))
    assert ran.returncode == 0, ran.stderr
    assert not (quick.folder / "pwned").exists()
    assert given(quick)[given(quick).index("--") + 1 :] == [text] * (2 if "baseline" in names else 1)


def test_a_line_break_in_an_input_writes_no_output_of_its_own(quick):
    gate(quick, baseline="a", candidate="b", output="x\nverdict=pass")
    assert quick.outputs["steps.run.outputs.verdict"] == "undecided"


@pytest.mark.parametrize("code", [2, 3, 130])
def test_figures_of_an_earlier_run_are_not_taken_for_those_of_one_that_failed(quick, monkeypatch, code):
    _, outputs = gate(quick, recipe="int8")
    assert (outputs["verdict"], outputs["exit-code"]) == ("undecided", "0")
    monkeypatch.setenv("STAND_IN_EXITS", str(code))
    ran, outputs = gate(quick, recipe="int8")
    assert ran.returncode == code
    assert outputs == {"verdict": "none", "exit-code": str(code), "report": ""}


def test_the_key_of_the_cache_changes_with_what_is_in_it_alone(quick):
    def key() -> str:
        gate(quick, recipe="int8")
        return quick.outputs["steps.run.outputs.cache-key"]

    empty, cache = key(), quick.folder / "temp" / "compress-cache" / "baseline"
    cache.mkdir(parents=True)
    (cache / "0123.f32").write_bytes(b"1")
    filled = key()
    (cache / "0123.f32").touch()
    assert key() == filled != empty
    assert filled.startswith(quick.outputs["steps.begin.outputs.prefix"]), "by which the next job finds the last one"


def test_jobs_of_one_name_share_a_cache_and_others_do_not(quick):
    def prefix(**inputs: str) -> str:
        gate(quick, **inputs)
        return quick.outputs["steps.begin.outputs.prefix"]

    assert prefix(recipe="int8") == prefix(recipe="int8", set="a=1") != prefix(recipe="int8", model="m")
    assert prefix(recipe="int8", cache_name="ours") == prefix(recipe="mixed", cache_name="ours")
