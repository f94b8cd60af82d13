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

pytestmark = pytest.mark.compilers

PROMPT, TOKENS = "Once upon a time", 64


@pytest.fixture(scope="module")
def folders(recipes, tmp_path_factory) -> dict:
    root, layout = tmp_path_factory.mktemp("js"), ["layout=transformers.js"]
    return {name: exporting.export_checkpoint(one.folder / "checkpoint", "onnx", root / name, layout)
            for name, one in recipes.items()}  # fmt: skip


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


@pytest.mark.parametrize("name", RECIPES)
def test_it_generates_our_own_tokens(folders, generated, name):
    assert generated[name] == own_greedy(folders[name])
