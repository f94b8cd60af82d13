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
QUICK = "--prompts\nself\n--samples\n2\n--length\n12\n--no-audit"


@dataclass
class Runner:
    """Enough of GitHub's runner for the steps that are scripts: contexts, outputs, and `python` on the path."""

    folder: Path
    outputs: dict[str, str] = field(default_factory=dict)

    def context(self, inputs: dict[str, str]) -> dict[str, str]:
        given = {name: described.get("default", "") for name, described in ACTION["inputs"].items()} | inputs
        known = {f"inputs.{name}": value for name, value in given.items()}
        known |= {"runner.temp": str(self.folder / "temp"), "github.action_path": str(ROOT)}
        return known | self.outputs

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
        (tools / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (tools / "python").chmod(0o755)
        path = f"{tools}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "GITHUB_OUTPUT": str(written)}


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


# --- the command


def test_a_gate_that_holds_ends_well_and_tells_verdict_and_report(runner, small, int8):
    limits = runner.folder / "limits of ours.yaml"
    limits.write_text("kl_divergence_mean: 5\n")
    ran, outputs = gate(runner, baseline=str(small), candidate=str(int8), limits=limits.name, args=QUICK)
    assert ran.returncode == 0, ran.stderr
    assert (outputs["verdict"], outputs["exit-code"]) == ("pass", "0")
    report = Path(outputs["report"])
    assert report == runner.folder / "compress-report"
    assert {path.name for path in report.iterdir()} == {"check.json", "report.html", "junit.xml"}
    assert json.loads((report / "check.json").read_text())["verdict"] == "pass"


def test_a_missed_limit_fails_the_step_after_the_outputs_are_told(runner, small, int8):
    args = QUICK + "\n--limit\nkl_divergence_mean=0"
    ran, outputs = gate(runner, baseline=str(small), candidate=str(int8), args=args, output="a report/here")
    assert ran.returncode == 1, ran.stderr
    assert "::error title=compress::verdict: fail" in ran.stdout
    assert (outputs["verdict"], outputs["exit-code"]) == ("fail", "1")
    assert (Path(outputs["report"]) / "junit.xml").is_file()
    assert outputs["report"] == str(runner.folder / "a report" / "here")


def test_a_recipe_is_applied_with_what_is_set(runner, small):
    settings = (
        "check.prompts=[self]\ncheck.samples=2\ncheck.length=12\n\nexport=[]\ncheck.limits={kl_divergence_mean: 5}"
    )
    ran, outputs = gate(runner, recipe="tiny-int8", model=str(small), set=settings, args="--seed\n3")
    assert ran.returncode == 0, ran.stderr
    assert (outputs["verdict"], outputs["report"]) == ("pass", str(runner.folder / "out" / "tiny-int8"))
    report = json.loads((runner.folder / "out" / "tiny-int8" / "report.json").read_text())
    assert {row["limit"] for row in report["checks"]} == {5, None}


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "give either recipe, or baseline and candidate"),
        ({"baseline": "a"}, "give either recipe"),
        ({"recipe": "tiny-int8", "candidate": "b"}, "give either recipe"),
        ({"recipe": "tiny-int8", "limits": "limits.yaml"}, "stand in the recipe"),
        ({"baseline": "a", "candidate": "b", "set": "x=1"}, "for a recipe"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(runner, inputs, said):
    ran, outputs = gate(runner, **inputs)
    assert ran.returncode == 2
    assert said in ran.stdout
    assert (outputs["verdict"], outputs["exit-code"], outputs["report"]) == ("none", "2", "")


@pytest.mark.parametrize("text", ["$(touch pwned)", '"; touch pwned; "', "`touch pwned`", "--help", "a\nverdict=pass"])
def test_an_input_is_never_run_nor_taken_for_an_option(runner, text):
    ran, outputs = gate(runner, baseline=text, candidate=text, limits=text, output="out")
    assert ran.returncode == 2, ran.stdout
    assert not (runner.folder / "pwned").exists()
    assert (outputs["verdict"], outputs["report"]) == ("none", ""), "bad input has no report"


def test_figures_of_an_earlier_run_are_not_taken_for_those_of_one_that_failed(runner, small, int8):
    gate(runner, baseline=str(small), candidate=str(int8), args=QUICK)
    ran, outputs = gate(runner, baseline=str(small), candidate=str(int8 / "nowhere"), args=QUICK)
    assert (ran.returncode, outputs["verdict"]) == (2, "none")


def test_the_key_of_the_cache_changes_with_what_is_in_it_alone(runner, small, int8):
    def key(**inputs: str) -> str:
        gate(runner, baseline=str(small), candidate=str(int8), **inputs)
        return runner.outputs["steps.run.outputs.cache-key"]

    first = key(args=QUICK)
    assert key(args=QUICK) == first
    other = key(args=QUICK + "\n--seed\n1")
    assert other != first
    prefix = runner.outputs["steps.begin.outputs.prefix"]
    assert first.startswith(prefix) and other.startswith(prefix), "so that the next job finds the last one"
    gate(runner, baseline=str(small), candidate=str(int8), cache_name="ours")
    assert runner.outputs["steps.begin.outputs.prefix"] != prefix
