"""What stock transformers makes of Nemotron-H checkpoints in every mixture of formats: what `report.runtimes` says of each is
what happens, and `compress.load` reads them all."""

import json
from pathlib import Path

import pytest
import torch
from nemotron_h_models import make_nemotron_h
from transformers import AutoModelForCausalLM

import compress
from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

IDS = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))
FIT = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "n_groups": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64,
    "layers_block_type": "ME*-E",
}  # fmt: skip
SOURCES = {
    "fit": FIT,
    "latent, biases": FIT | {"moe_latent_size": 32, "mlp_bias": True, "use_bias": True},
    "dense": FIT | {"layers_block_type": "M-*M"},
    "wide": FIT | {"moe_intermediate_size": 160},
    "odd": FIT | {"moe_intermediate_size": 40},
}
BRIEF = {"prompts": ["self"], "samples": 4, "length": 32}
ONE_LAYER = {"role": "experts", "layers": [1], "weights": "none"}

# source, then the block of `quantize`
CASES = {
    "bf16": ("fit", {"weights": "bf16"}),
    "int8": ("fit", {"weights": "int8"}),
    "int8, latent": ("latent, biases", {"weights": "int8"}),
    "int8, no experts": ("dense", {"weights": "int8"}),
    "int8-tensor": ("fit", {"weights": "int8-tensor"}),
    "int8-g32": ("fit", {"weights": "int8-g32"}),
    "int4-g32": ("fit", {"weights": "int4-g32"}),
    "int4-g32, latent": ("latent, biases", {"weights": "int4-g32"}),
    "int4-g32, experts fall back to g8": ("odd", {"weights": "int4-g32"}),
    "fp8": ("fit", {"weights": "fp8-e4m3"}),
    "fp8, latent": ("latent, biases", {"weights": "fp8-e4m3"}),
    "fp8-tensor": ("fit", {"weights": "fp8-e4m3-tensor"}),
    "fp8-b128": ("fit", {"weights": "fp8-e4m3-b128"}),
    "fp8-b128, wide experts": ("wide", {"weights": "fp8-e4m3-b128"}),
    "fp8-b128, wide experts none": ("wide", {"weights": "fp8-e4m3-b128", "roles": {"experts": "none"}}),
    "fp8 static": ("fit", {"weights": "fp8-e4m3", "activations": "static-fp8"}),
    "fp8 dynamic": ("fit", {"weights": "fp8-e4m3", "activations": "dynamic-fp8"}),
    "int8 static": ("fit", {"weights": "int8", "activations": "static-int8"}),
    "int8 dynamic": ("fit", {"weights": "int8", "activations": "dynamic-int8"}),
    "experts int8, the rest none": ("fit", {"weights": "none", "roles": {"experts": "int8"}}),
    "experts none, int8": ("fit", {"weights": "int8", "roles": {"experts": "none"}}),
    "experts none, int4-g32": ("fit", {"weights": "int4-g32", "roles": {"experts": "none"}}),
    "experts of one layer none, int8": ("fit", {"weights": "int8", "overrides": [ONE_LAYER]}),
    "experts of one layer none, the rest none": (
        "fit",
        {"weights": "none", "roles": {"experts": "int8"}, "overrides": [ONE_LAYER]},
    ),
    "experts of one layer none, fp8": ("fit", {"weights": "fp8-e4m3", "overrides": [ONE_LAYER]}),
    "experts of one layer none, the others fp8, int8": (
        "fit",
        {"weights": "int8", "roles": {"experts": "fp8-e4m3"}, "overrides": [ONE_LAYER]},
    ),
    "experts none, fp8": ("fit", {"weights": "fp8-e4m3", "roles": {"experts": "none"}}),
    "experts int4-g32, int8": ("fit", {"weights": "int8", "roles": {"experts": "int4-g32"}}),
    "experts int4-g32, fp8": ("fit", {"weights": "fp8-e4m3", "roles": {"experts": "int4-g32"}}),
    "experts int8, int4-g32": ("fit", {"weights": "int4-g32", "roles": {"experts": "int8"}}),
    "experts fp8, int8": ("fit", {"weights": "int8", "roles": {"experts": "fp8-e4m3"}}),
    "experts int8, fp8": ("fit", {"weights": "fp8-e4m3", "roles": {"experts": "int8"}}),
    "shared experts none, int8": ("fit", {"weights": "int8", "roles": {"shared_experts": "none"}}),
    "shared experts int4-g32, int8": ("fit", {"weights": "int8", "roles": {"shared_experts": "int4-g32"}}),
    "latent none, int4-g32": ("latent, biases", {"weights": "int4-g32", "roles": {"moe_latent": "none"}}),
    "attention and Mamba none, int4-g32": (
        "fit",
        {
            "weights": "int4-g32",
            "roles": dict.fromkeys(("ssm_in", "ssm_out", "attention_qkv", "attention_out"), "none"),
        },
    ),
    "lm_head int8-tensor, int8": ("fit", {"weights": "int8", "roles": {"lm_head": "int8-tensor"}}),
    "lm_head int8, int4-g32": ("fit", {"weights": "int4-g32", "roles": {"lm_head": "int8"}}),
    "down_proj int8, int4-g32": (
        "fit",
        {"weights": "int4-g32", "overrides": [{"role": "experts", "projections": ["down_proj"], "weights": "int8"}]},
    ),
    "rotated fp8": (
        "fit",
        {"weights": "fp8-e4m3", "activation_roles": {"ssm_out": "static-fp8"}, "rotate": ["ssm_out"]},
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: make_nemotron_h(root / name, **changes) for name, changes in SOURCES.items()}


@pytest.fixture(scope="module", params=CASES)
def out(request, sources, tmp_path_factory) -> Path:
    source, options = CASES[request.param]
    return apply(sources[source], tmp_path_factory.mktemp("out") / "out", {"quantize": options})


def apply(source: Path, folder: Path, step: dict) -> Path:
    overrides = ("check=null", "export=[]", f"passes={json.dumps([step])}", f"calibration={json.dumps(BRIEF)}")
    pipeline.apply(pipeline.Job(load_recipe("tiny-int8", overrides), resolve(str(source)), folder))
    return folder


def assert_same_weights(model: torch.nn.Module, folder: Path, *, rounded: bool = False) -> None:
    """Every weight of ours at its place in transformers' model, bit for bit; with `rounded` as bfloat16 has it."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    ours = Checkpoint(folder, allow_quantized=True).model
    for weight in ours.weights:
        place = ours.architecture.transformers_place(weight.name)
        found, expected = tensors[place.parameter][place.index], weight.dense()
        exact = torch.equal(found.float(), expected)
        assert exact or (rounded and torch.equal(found.bfloat16(), expected.bfloat16())), weight.name


def test_what_is_loaded_is_what_our_reader_gives(out):
    model = compress.load(out)
    assert_same_weights(model, out / "checkpoint")
    assert model(IDS, use_cache=False).logits.isfinite().all()


def test_stock_transformers_loads_what_the_report_says_it_does_and_stops_at_the_rest(out):
    assert_loaded_or_stopped_as_said(out)


@pytest.mark.parametrize(("pruned", "loads"), [({"keep": 4}, True), ({"budget": 0.25}, False)])
def test_stock_transformers_loads_a_pruned_one_where_all_layers_keep_as_many(sources, tmp_path, pruned, loads):
    assert assert_loaded_or_stopped_as_said(apply(sources["fit"], tmp_path / "out", {"prune_experts": pruned})) is loads


def assert_loaded_or_stopped_as_said(out) -> bool:
    """Whether it loads."""
    said = json.loads((out / "report.json").read_text())["runtimes"][0]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            out / "checkpoint", dtype=torch.float32
        )  # may leave weights random
    except Exception as error:  # of many types
        assert not said["loads"], error
        return False
    assert said["loads"], said["why"]
    assert_same_weights(model, out / "checkpoint", rounded=True)
    return True
