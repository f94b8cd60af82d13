"""Transformers.js under node (onnxruntime-node) generates our own greedy tokens from every shipped recipe."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from exported_models import RECIPES

from compress.apply import exporting
from compress.recipe.source import load_tokenizer
from compress.runtime.artifacts import find_artifact, open_artifact
from compress.runtime.runtimes import of_onnx

pytestmark = pytest.mark.compilers

# it begins with states of zeros in float32
TAKEN = {name: recipe for name, recipe in RECIPES.items() if not name.startswith("state-")}

PROMPT, TOKENS = "Once upon a time", 64


@pytest.fixture(scope="module")
def folders(recipes, tmp_path_factory) -> dict:
    root, layout = tmp_path_factory.mktemp("js"), ["layout=transformers.js"]
    return {name: exporting.export_checkpoint(recipes[name].folder / "checkpoint", "onnx", root / name, layout)
            for name in TAKEN}  # fmt: skip


@pytest.fixture(scope="module")
def generated(folders, from_environment, tmp_path_factory) -> dict[str, list[int]]:
    job = tmp_path_factory.mktemp("job") / "job.json"
    modules, paths = from_environment("COMPRESS_NODE_MODULES"), [str(folder) for folder in folders.values()]
    job.write_text(json.dumps({"modules": str(modules), "folders": paths, "prompt": PROMPT, "tokens": TOKENS}))
    command = [str(from_environment("COMPRESS_NODE")), str(Path(__file__).with_name("generate.mjs")), str(job)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    return {name: found[str(folder)] for name, folder in folders.items()}


def own_greedy(folder) -> list[int]:
    artifact = open_artifact(find_artifact(folder))
    ids = load_tokenizer(folder)(PROMPT).input_ids
    steps, end = artifact.steps(1), artifact.config.eos_token_id
    logits = steps.step(torch.tensor([ids]))
    for _ in range(TOKENS):
        ids = [*ids, int(logits.argmax())]
        if ids[-1] == end:
            break
        logits = steps.step(torch.tensor([ids[-1:]]))
    return ids


def test_what_it_does_not_take_is_said(recipes):
    rows = {name: of_onnx(one.stored(), "onnx", "transformers.js") for name, one in recipes.items()}
    loads = {name: next(row.loads for row in found if row.name == "transformers.js") for name, found in rows.items()}
    assert loads == {name: name in TAKEN for name in recipes}


@pytest.mark.parametrize("name", TAKEN)
def test_it_generates_our_own_tokens(folders, generated, name):
    assert generated[name] == own_greedy(folders[name])
