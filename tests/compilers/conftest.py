"""The second stage of CI: what we export under the runtimes that others have. `.ci/run` makes the environment.

A skip fails here: a runtime that is missing is a promise that nobody checks.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import with_onnxruntime
from exported_models import NEMOTRON_H, RECIPES, Exported, exported, settings
from jamba_models import make_jamba
from nemotron_h_models import make_nemotron_h
from test_onnx_formats import SHAPES, SPREAD

from compress.recipe.recipe import load_recipe

MODELS = Path(__file__).resolve().parents[2] / "models"  # the wheel has one of them only
BRIEF = ("calibration.samples=4", "calibration.length=128", "calibration.prompts=[prose]")
BRIEFLY = {
    "tiny-int8": (),
    "state-auto": ("calibration.samples=1", "calibration.length=280", "calibration.prompts=[prose]"),
}
SELF = {"prompts": ["self"], "samples": 4, "length": 32}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped, which this stage does not allow: {report.longrepr}"


@pytest.fixture(scope="session")
def from_environment():
    """The path in a variable that .ci/run sets."""

    def path(name: str) -> Path:
        assert name in os.environ, f"{name} is not set: .ci/run makes what these tests need"
        return Path(os.environ[name])

    return path


@pytest.fixture(scope="session")
def recipes(tmp_path_factory) -> dict[str, Exported]:
    """Every shipped recipe on both reference models, calibrated briefly."""
    root, found = tmp_path_factory.mktemp("recipes"), {}
    for name, (recipe, model) in RECIPES.items():
        loaded = load_recipe(recipe, ("check=null", *BRIEFLY.get(recipe, BRIEF)))
        found[name] = exported(loaded, MODELS / model, root / name)
    return found


@pytest.fixture(scope="session")
def variants(tmp_path_factory) -> dict[str, Exported]:
    """Small models in every format of matrices and states."""
    root, found = tmp_path_factory.mktemp("variants"), {}
    sources = {
        name: make_jamba(root / name, spread=SPREAD, **{"num_hidden_layers": 4, **changes})
        for name, changes in SHAPES.items()
    } | {name: make_nemotron_h(root / name, spread=SPREAD, **changes) for name, changes in NEMOTRON_H.items()}
    for number, (name, (shape, step)) in enumerate(settings().items()):
        text = {"version": 1, "calibration": SELF, "passes": [step], "export": [{"onnx": {}}]}
        (root / f"{number}.yaml").write_text(json.dumps(text))
        found[name] = exported(load_recipe(str(root / f"{number}.yaml")), sources[shape], root / f"out{number}")
    return found


@pytest.fixture(scope="session")
def run_elsewhere(tmp_path_factory):
    """Logits of many graphs under another interpreter's onnxruntime, and its version."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(python: Path, many: dict[str, Exported], level: str | None) -> tuple[str, dict[str, dict]]:
        jobs = [
            {"model": str(one.model), "out": str(folder / f"{i}.npz"), "vocabulary": one.vocabulary, "level": level}
            for i, one in enumerate(many.values())
        ]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        command = [str(python), with_onnxruntime.__file__, str(folder / "jobs.json")]
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout.strip(), {name: dict(np.load(job["out"])) for name, job in zip(many, jobs, strict=True)}

    return run
