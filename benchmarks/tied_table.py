"""What it brings to calibrate a tied embedding as the output matrix it also is: `python benchmarks/tied_table.py`.

The reference model is made tied (its output matrix replaced by its embedding) and compared with itself, only the table
being quantized: mean KL on 8 held-out windows of 512 tokens, calibrated on 24 windows of `prose`.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import yaml
from machine import describe_machine
from safetensors.torch import load_file, save_file

from compress.apply import pipeline
from compress.calibration import inputs
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

FORMATS = ("int8", "int8-g32", "int4-g32", "fp8-e4m3")
SHARE = inputs.LOOKUP_SHARE
VARIANTS = {  # the method, and what the rows count as looked up
    "rounded to nearest, clip mse": ({"method": "rtn", "clip": "mse"}, SHARE),
    "fitted to products alone": ({"method": "gptq"}, 0.0),
    "to both": ({"method": "gptq"}, SHARE),
}


def tied(folder: Path) -> Path:
    """The reference model with one table for both."""
    source = resources.folder("models") / "tiny-jamba"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def divergence(model: Path, root: Path, number_format: str, method: dict) -> float:
    """Mean KL of the checkpoint, prefill."""
    block = {**method, "weights": "none", "roles": {"lm_head": number_format}}
    recipe = {
        "version": 1,
        "calibration": {"prompts": ["prose"], "samples": 24, "length": 512},
        "passes": [{"quantize": block}],
        "check": {"prompts": ["heldout"], "samples": 8, "length": 512},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = pipeline.Job(load_recipe(str(root / "recipe.yaml")), resolve(str(model)), root / "out", overwrite=True)
    rows = pipeline.apply(job)["checks"]
    return next(row["value"] for row in rows if row["metric"] == "kl_divergence_mean")


def main() -> None:
    print("| the table as | " + " | ".join(VARIANTS) + " |\n" + "|---" * (1 + len(VARIANTS)) + "|")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = tied(root / "tied-jamba")
        for number_format in FORMATS:
            found = []
            for method, share in VARIANTS.values():
                inputs.LOOKUP_SHARE = share
                found.append(divergence(model, root, number_format, method))
            print(f"| `{number_format}` | " + " | ".join(f"{value:.3g}" for value in found) + " |", flush=True)
    print(json.dumps(describe_machine()), file=sys.stderr)


if __name__ == "__main__":
    main()
