"""Sizes, build times and memory of TensorRT engines: `python benchmarks/tensorrt_engines.py [MODEL ...] [--shape SHAPE]`.

Every recipe is applied to every model (the two small trained ones by default), its check off, and the engine built ahead of time
(extra `tensorrt-rtx`). `--shape` does it for a random checkpoint of benchmarks/shapes.py, in bf16 and int8. The table sets the
weights in the engine beside the arithmetic of their formats; what an engine has beyond them are kernels for its GPUs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe_machine
from shapes import SHAPES, make

ROOT = Path(__file__).parents[1]
TRAINED = ("models/tiny-jamba", "models/tiny-nemotron-h")
FORMS = {  # what is measured: the recipe, and the type of hidden states
    "fp16": ("tensorrt-fp16", "fp16"),
    "bf16": ("tensorrt-fp16", "bf16"),
    "fp8 weights and inputs": ("tensorrt-fp8", "bf16"),
    "int8 weights and inputs": ("tensorrt-int8", "bf16"),
    "int8 weights": ("int8", "bf16"),
    "int4 weights (g32, GPTQ)": ("int4-gptq", "bf16"),
    "mixed": ("mixed", "bf16"),
    "experts removed": ("prune-experts", "bf16"),
    "int8 states": ("state-int8", "bf16"),
}
RANDOM_FORMS = {"bf16": ("tensorrt-fp16", "bf16"), "int8 weights": ("tiny-int8", "bf16")}
HEADER = "| model | form | weights, bytes | in the engine | engine | parse and build, s | peak memory, MiB | widened |"


def measure(model: Path, recipe: str, precision: str, out: Path) -> dict:
    """What build.json says of one engine."""
    export = f"export=[{{tensorrt: {{precision: {precision}, build: required}}}}]"
    command = [sys.executable, "-m", "compress", "apply", recipe, "-m", model, "-o", out, "--overwrite"]
    run = subprocess.run(
        [*map(str, command), "--set", export, "--set", "check=null"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    if run.returncode not in (0, 1):
        raise SystemExit(run.stderr)
    return json.loads((out / "tensorrt" / "build.json").read_text())


def row(model: str, form: str, built: dict) -> str:
    numbers = (built["expected_weight_bytes"], built["engine_weight_bytes"], built["engine_bytes"])
    bytes_ = " | ".join(f"{number:,}" for number in numbers)
    memory = built["peak_rss_bytes"] / 2**20
    return f"| {model} | {form} | {bytes_} | {built['seconds']:.1f} | {memory:,.0f} | {len(built['widened'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, default=[ROOT / name for name in TRAINED])
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="where to work; kept")
    arguments = parser.parse_args()
    print(json.dumps(describe_machine()), HEADER, "|---|---|---|---|---|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        models = [make(arguments.shape, folder / arguments.shape)] if arguments.shape else arguments.models
        for model in models:
            for form, (recipe, precision) in (RANDOM_FORMS if arguments.shape else FORMS).items():
                print(row(model.name, form, measure(model, recipe, precision, folder / "out")), flush=True)


if __name__ == "__main__":
    main()
