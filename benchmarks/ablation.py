"""What each algorithm and each number format costs or brings on a reference model: `python benchmarks/ablation.py [--text FILE]...`

Every variant is a `quantize` block; its checkpoint is written by `apply` and judged by mean KL on the second half of
chunks of 512 tokens (benchmarks/quality.py), on the shipped held-out prompts and on every text given. `--only` picks
sections by the beginning of their name.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import yaml
from machine import describe_machine
from quality import measure, prepare

from compress.apply import pipeline
from compress.model.roles import QUANTIZABLE
from compress.recipe import resources
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

CALIBRATION = {"prompts": ["prose", "self"], "samples": 24, "length": 512}
INT4 = {"weights": "int4-g32", "roles": {"lm_head": "int8-g32", "embedding": "int8-g32"}}
W8A8 = {"weights": "int8", "activations": "static-int8"}
SSM_OUT = W8A8 | {"activation_roles": {"ssm_out": "static-int8"}}
ROTATED = {"rotate": ["ssm_out", "mlp", "experts"]}
MATRICES = sorted(QUANTIZABLE)
FORMATS = ("int8", "fp8-e4m3", "int4-g32", "int4-g64")

SECTIONS = {
    "formats: everything round to nearest": {
        name: {"weights": name}
        for name in (
            "int8", "int8-tensor", "int8-g32", "fp8-e4m3", "fp8-e4m3-tensor", "fp8-e4m3-b128", "int4-g16", "int4-g32",
            "int4-g64", "int4-g128", "fp16",
        )
    },
    "gptq: int4-g32, head and embedding int8-g32": {
        "rtn": INT4,
        "rtn, clip mse": INT4 | {"clip": "mse"},
        "gptq, no clip": INT4 | {"method": "gptq", "clip": "none"},
        "gptq": INT4 | {"method": "gptq"},
        "gptq, columns in order": INT4 | {"method": "gptq", "act_order": False},
        "gptq, damping 0.001": INT4 | {"method": "gptq", "damping": 0.001},
        "gptq, damping 0.1": INT4 | {"method": "gptq", "damping": 0.1},
        "gptq, equalize 0.25": INT4 | {"method": "gptq", "equalize": 0.25},
        "gptq, equalize 0.5": INT4 | {"method": "gptq", "equalize": 0.5},
    },
    "int8: int8 and int8-g32": {
        "int8": {"weights": "int8"},
        "int8, clip mse": {"weights": "int8", "clip": "mse"},
        "int8, gptq": {"weights": "int8", "method": "gptq"},
        "int8-g32, clip mse": {"weights": "int8-g32", "clip": "mse"},
        "int8-g32, gptq": {"weights": "int8-g32", "method": "gptq"},
    },
    "hadamard: int8 weights, static-int8 activations": {
        f"{name}{how}": {"weights": "int8", **block, **({"rotate": roles} if how else {})}
        for name, block, roles in (
            ("ssm_out", {"activation_roles": {"ssm_out": "static-int8"}}, ["ssm_out"]),
            ("mlp", {"activation_roles": {"mlp": "static-int8"}}, ["mlp"]),
            ("experts", {"activation_roles": {"experts": "static-int8"}}, ["experts"]),
            ("default roles", {"activations": "static-int8"}, ["mlp", "experts"]),
            (
                "default roles and ssm_out",
                {"activations": "static-int8", "activation_roles": {"ssm_out": "static-int8"}},
                ["mlp", "experts", "ssm_out"],
            ),
        )
        for how in ("", ", rotated")
    },
    "activations: int8 weights": {
        "weights only": {"weights": "int8"},
        "dynamic-int8": {"weights": "int8", "activations": "dynamic-int8"},
        "dynamic-int8, and ssm_out": SSM_OUT | {"activations": "dynamic-int8", "activation_roles": {"ssm_out": "dynamic-int8"}},
        "static-int8 minmax": W8A8,
        "static-int8 percentile 0.9999": W8A8 | {"activation_range": "percentile"},
        "static-int8 mse": W8A8 | {"activation_range": "mse"},
        "static-int8 minmax, equalize 0.5": W8A8 | {"equalize": 0.5},
        "static-int8 minmax, equalize 0.75": W8A8 | {"equalize": 0.75},
        "static-int8 minmax, and ssm_out": SSM_OUT,
        "the same, rotated": SSM_OUT | ROTATED,
        "the same, rotated, mse": SSM_OUT | ROTATED | {"activation_range": "mse"},
        "the same, rotated, mse, equalize 0.5": SSM_OUT | ROTATED | {"activation_range": "mse", "equalize": 0.5},
        "the same, rotated, mse, gptq": SSM_OUT | ROTATED | {"activation_range": "mse", "method": "gptq"},
    },
    "ssm activations: int8 weights, static-int8 for one role more": {
        f"{role} {how}": {"weights": "int8", "activation_roles": {role: "static-int8"}, "activation_range": how}
        for role in ("ssm_x_proj", "ssm_dt_proj", "ssm_out")
        for how in ("minmax", "percentile", "mse")
    },
    "fp8": {
        "fp8-e4m3": {"weights": "fp8-e4m3"},
        "fp8-e4m3, clip mse": {"weights": "fp8-e4m3", "clip": "mse"},
        "fp8-e4m3, gptq": {"weights": "fp8-e4m3", "method": "gptq"},
        "fp8-e4m3, gptq, dynamic-fp8": {"weights": "fp8-e4m3", "method": "gptq", "activations": "dynamic-fp8"},
        "fp8-e4m3, gptq, static-fp8": {"weights": "fp8-e4m3", "method": "gptq", "activations": "static-fp8"},
        "fp8-e4m3-tensor, gptq": {"weights": "fp8-e4m3-tensor", "method": "gptq"},
    },
    "roles: one role in a format, round to nearest, the rest as it came": {
        f"{role} {name}": {"weights": "none", "roles": {role: name}} for role in MATRICES for name in FORMATS
    },
}  # fmt: skip


def run(block: dict, folder: Path, model: Path) -> Path:
    """The checkpoint of one variant."""
    recipe = folder / "variant.yaml"
    recipe.write_text(yaml.safe_dump({"version": 1, "calibration": CALIBRATION, "passes": [{"quantize": block}]}))
    pipeline.apply(pipeline.Job(load_recipe(str(recipe)), resolve(str(model)), folder / "out", overwrite=True))
    return folder / "out" / "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", action="append", default=[], help="A text file to judge on as well.")
    parser.add_argument("--only", action="append", default=[], help="The beginning of a section's name.")
    parser.add_argument("-m", "--model", type=Path, default=resources.folder("models") / "tiny-jamba")
    arguments = parser.parse_args()
    prepared = {name: prepare(name, arguments.model) for name in ["heldout", *arguments.text]}
    titles = ["heldout", *(f"text {i + 1}" for i in range(len(arguments.text)))]
    with tempfile.TemporaryDirectory() as temporary:
        for section, variants in SECTIONS.items():
            if arguments.only and not section.startswith(tuple(arguments.only)):
                continue
            print(f"\n{section}\n\n| variant | weight bytes | {' | '.join('KL ' + t for t in titles)} |")
            print("|---" * (2 + len(titles)) + "|")
            for name, block in variants.items():
                checkpoint = run(block, Path(temporary), arguments.model)
                found = [measure(checkpoint, *prepared[key]) for key in prepared]
                values = [f"{result['runs']['checkpoint']['kl_divergence_mean']:.5f}" for result in found]
                print(f"| {name} | {found[0]['weight_bytes']:,} | {' | '.join(values)} |", flush=True)
    print(json.dumps(describe_machine()), file=sys.stderr)


if __name__ == "__main__":
    main()
