"""Every shipped recipe under every runtime, against our own forward of the checkpoint: `python benchmarks/runtimes.py ROOT
[--onnxruntime PYTHON]... [--openvino PYTHON] [--node NODE --modules FOLDER]`.

ROOT/RECIPE is made by `apply` where it is missing (calibrated as shipped, no check). A cell says how many of 64 greedily
generated tokens are the reference's before the first other one, and the largest difference of logits on the reference's own
text, at once and token by token. Runtimes round inputs to 8 bits where products are fused (docs/onnx.md), as they do by
default: texts may part where two tokens are about as likely.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import compress
from compress.apply import exporting, pipeline
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.recipe.source import load_tokenizer, resolve
from compress.runtime.artifacts import open_artifact

PROMPT, TOKENS = "Once upon a time there was a little", 64
CLIENT = Path(__file__).with_name("runtime_client.py")
NODE_CLIENT = CLIENT.with_suffix(".mjs")


@dataclass
class Found:
    """What a runtime gave: tokens, and logits [S, V] of the reference's text by phase."""

    version: str
    tokens: list[int]
    logits: dict[str, np.ndarray]


def apply(name: str, out: Path) -> Path:
    if not out.is_dir():
        loaded = load_recipe(name, ("check=null",))
        pipeline.apply(pipeline.Job(loaded, resolve(loaded.recipe.model, loaded.folder), out))
    return out


@torch.inference_mode()
def reference(checkpoint: Path) -> tuple[list[int], Found]:
    """Our own forward: the prompt's ids, tokens and logits."""
    artifact, prompt = open_artifact(checkpoint), load_tokenizer(checkpoint)(PROMPT).input_ids
    steps, tokens, ids = artifact.steps(1), [], prompt
    for _ in range(TOKENS):
        tokens.append(int(steps.step(torch.tensor([ids])).argmax()))
        ids = tokens[-1:]
    text, steps = prompt + tokens, artifact.steps(1)
    logits = torch.cat([steps.step(torch.tensor([[token]])) for token in text]).numpy()
    return prompt, Found(compress.__version__, tokens, {"prefill": logits, "decode": logits})


@torch.inference_mode()
def with_transformers(model, version: str, prompt: list[int], text: list[int]) -> Found:
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
    return Found(version, tokens[0, len(prompt) :].tolist(), {"prefill": model(torch.tensor([text])).logits[0].numpy()})


def stock(checkpoint: Path, prompt: list[int], text: list[int]) -> Found:
    import transformers

    config = CompressedTensorsConfig(dequantize=True)
    is_quantized = "quantization_config" in json.loads((checkpoint / "config.json").read_text())
    more = {"quantization_config": config} if is_quantized else {}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **more)
    return with_transformers(model.eval(), transformers.__version__, prompt, text)


def elsewhere(command: list[str], prompt: list[int], text: list[int]) -> Found:
    """A client in a process of its own. Raises RuntimeError with the last line it wrote where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        job, out = Path(folder) / "job.json", Path(folder) / "logits.npz"
        job.write_text(json.dumps({"prompt": prompt, "text": text, "tokens": TOKENS, "out": str(out)}))
        result = subprocess.run([*command, str(job)], capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stderr.strip().splitlines()[-1])
        found = json.loads(result.stdout.strip().splitlines()[-1])
        logits = dict(np.load(out)) if out.is_file() else {"prefill": np.array(found["logits"]).reshape(len(text), -1)}
    return Found(found["version"], found["tokens"], logits)


def runs(arguments, out: Path, prompt: list[int], text: list[int]) -> dict[str, Callable[[], Found]]:
    """Runtime -> what runs it."""
    checkpoint, onnx = out / "checkpoint", str(out / "onnx")

    def python(interpreter: str, runtime: str) -> Callable[[], Found]:
        return lambda: elsewhere([interpreter, str(CLIENT), runtime, onnx], prompt, text)

    found = {
        "compress.load": lambda: with_transformers(compress.load(checkpoint), compress.__version__, prompt, text),
        "transformers": lambda: stock(checkpoint, prompt, text),
        **{f"onnxruntime ({i + 1})": python(path, "onnxruntime") for i, path in enumerate(arguments.onnxruntime)},
        "onnxruntime": python(sys.executable, "onnxruntime"),
        "onnxruntime, exact": python(sys.executable, "onnxruntime-exact"),
        "onnxruntime-genai": python(sys.executable, "genai"),
    }
    if arguments.openvino:
        found["openvino"] = python(arguments.openvino, "openvino")
    if arguments.node:
        found["transformers.js"] = lambda: with_node(arguments, out, prompt, text)
    return found


def with_node(arguments, out: Path, prompt: list[int], text: list[int]) -> Found:
    folder = out.with_name(out.name + "-js")
    if not folder.is_dir():
        exporting.export_checkpoint(out / "checkpoint", "onnx", folder, ("layout=transformers.js",))
    command = [arguments.node, str(NODE_CLIENT), arguments.modules, str(folder.resolve())]
    return elsewhere(command, prompt, text)


def cell(run: Callable[[], Found], ours: Found) -> tuple[str, str]:
    """The cell, and the version."""
    try:
        found = run()
    except Exception as error:  # a runtime that refuses is a result
        print(f"  {type(error).__name__}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return "refuses", ""
    same = next((i for i, pair in enumerate(zip(ours.tokens, found.tokens, strict=True)) if len(set(pair)) > 1), TOKENS)
    apart = max(np.abs(found.logits[p] - ours.logits[p][-len(found.logits[p]) :]).max() for p in found.logits)
    return f"{same}, {apart:.2g}", found.version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--onnxruntime", action="append", default=[], help="An interpreter with an older onnxruntime.")
    parser.add_argument("--openvino", help="An interpreter with openvino.")
    parser.add_argument("--node", help="node, where --modules has @huggingface/transformers.")
    parser.add_argument("--modules")
    arguments = parser.parse_args()
    rows, versions = {}, {}
    for name in resources.shipped_recipes():
        out = apply(name, arguments.root / name)
        prompt, ours = reference(out / "checkpoint")
        for runtime, run in runs(arguments, out, prompt, prompt + ours.tokens).items():
            print(f"{name}: {runtime}", file=sys.stderr)
            rows[name, runtime], version = cell(run, ours)
            versions[runtime] = version or versions.get(runtime, "")
    titles = (f"{re.sub(r'(, exact| [(].*)$', '', name)} {version}" for name, version in versions.items())
    print(f"| recipe | {' | '.join(titles)} |")
    print("|---" * (1 + len(versions)) + "|")
    for name in resources.shipped_recipes():
        print(f"| `{name}` | " + " | ".join(rows[name, runtime] for runtime in versions) + " |")
    print(json.dumps(describe_machine()), file=sys.stderr)


if __name__ == "__main__":
    main()
