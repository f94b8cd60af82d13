"""`compress.load` reads every checkpoint that is written; stock transformers reads those docs/checkpoints.md lists, and
stops at the others instead of taking their weights for something else."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from jamba_models import fused, make_jamba
from refusals import refusal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, JambaForCausalLM

import compress
from compress.apply import pipeline
from compress.checkpoint.reader import Checkpoint
from compress.errors import WorkError
from compress.model.architecture import Place
from compress.model.families import jamba
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.runtime import loading, runtimes
from compress.runtime.inference import Head, stream

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERTS = 3
IDS = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(0))

# Groups of 32 divide every K but that of dt_proj
FIT = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 4}
SOURCES = {
    "fit": FIT,
    "tied": FIT | {"tie_word_embeddings": True},
    "rank 32": FIT | {"mamba_dt_rank": 32},
    "dense": FIT | {"num_experts": 1, "num_experts_per_tok": 1},
    "float32": FIT | {"dtype": torch.float32},
    "wide": {"hidden_size": 160, "intermediate_size": 288, "num_hidden_layers": 4},  # several blocks of 128x128
}

# What stock transformers does with it
EQUAL = "loads"  # every value equals what our reader gives
ROUNDED = "rounds"  # the same, but scales in bfloat16 make values bfloat16: equal once ours are rounded to that
REFUSED = "refuses"  # an error


class Case(NamedTuple):
    source: str
    options: dict
    stock: str


def case(stock: str, weights: str, source: str = "fit", **options) -> Case:
    return Case(source, {"method": "rtn", "weights": weights, **options}, stock)


KEPT_DT = {"ssm_dt_proj": "none"}
DOWN = {"role": "experts", "projections": ["down_proj"]}
CASES = {
    "int8": case(EQUAL, "int8"),
    "int8, tied": case(EQUAL, "int8", "tied"),
    "int8, no experts": case(EQUAL, "int8", "dense"),
    "int8-tensor": case(EQUAL, "int8-tensor"),
    "int8-g32, no dt": case(ROUNDED, "int8-g32", roles=KEPT_DT),
    "int8-g32, dt falls back": case(REFUSED, "int8-g32"),
    "int4-g32, no dt": case(ROUNDED, "int4-g32", roles=KEPT_DT),
    "int4-g32, no dt, tied": case(ROUNDED, "int4-g32", "tied", roles=KEPT_DT),
    "int4-g32, all fit": case(ROUNDED, "int4-g32", "rank 32"),
    "int4-g32, dt falls back": case(REFUSED, "int4-g32"),
    "int4-g64, some fall back to g32": case(REFUSED, "int4-g64", roles=KEPT_DT),
    "fp8": case(EQUAL, "fp8-e4m3"),
    "fp8, tied": case(EQUAL, "fp8-e4m3", "tied"),
    "fp8 of float32": case(EQUAL, "fp8-e4m3", "float32"),
    "fp8-tensor": case(EQUAL, "fp8-e4m3-tensor"),
    "fp8-b128": case(REFUSED, "fp8-e4m3-b128", "wide"),
    "fp8-b128, experts none": case(EQUAL, "fp8-e4m3-b128", "wide", roles={"experts": "none"}),
    "fp8-b128 within one block": case(EQUAL, "fp8-e4m3-b128"),
    "fp8 static": case(EQUAL, "fp8-e4m3", activations="static-fp8"),
    "fp8 dynamic": case(EQUAL, "fp8-e4m3", activations="dynamic-fp8"),
    "int8 static": case(REFUSED, "int8", activations="static-int8"),
    "int8 dynamic": case(REFUSED, "int8", activations="dynamic-int8"),
    "experts int8, the rest none": case(EQUAL, "none", roles={"experts": "int8"}),
    "experts none, int8": case(EQUAL, "int8", roles={"experts": "none"}),
    "experts none, int4-g32": case(ROUNDED, "int4-g32", roles=KEPT_DT | {"experts": "none"}),
    "experts none, fp8": case(EQUAL, "fp8-e4m3", roles={"experts": "none"}),
    "experts int4-g32, int8": case(ROUNDED, "int8", roles={"experts": "int4-g32"}),
    "experts int4-g32, int8, no dt": case(ROUNDED, "int8", roles=KEPT_DT | {"experts": "int4-g32"}),
    "experts int4-g32, fp8": case(ROUNDED, "fp8-e4m3", roles={"experts": "int4-g32"}),
    "experts int8, int4-g32": case(ROUNDED, "int4-g32", roles=KEPT_DT | {"experts": "int8"}),
    "experts fp8, int8": case(EQUAL, "int8", roles={"experts": "fp8-e4m3"}),
    "experts int4-g32, lm_head int8-g32, int8": case(
        REFUSED, "int8", roles=KEPT_DT | {"experts": "int4-g32", "lm_head": "int8-g32"}
    ),
    "experts int8, fp8": case(EQUAL, "fp8-e4m3", roles={"experts": "int8"}),
    "lm_head int8-tensor, int8": case(EQUAL, "int8", roles={"lm_head": "int8-tensor"}),
    "lm_head int8, int4-g32": case(REFUSED, "int4-g32", roles=KEPT_DT | {"lm_head": "int8"}),
    "down_proj int8, int4-g32": case(REFUSED, "int4-g32", roles=KEPT_DT, overrides=[DOWN | {"weights": "int8"}]),
    "rotated fp8": case(REFUSED, "fp8-e4m3", activation_roles={"ssm_out": "static-fp8"}, rotate=["ssm_out"]),
    "rotated int8 and int8-g32": case(
        REFUSED,
        "int8",
        roles={"ssm_x_proj": "int8-g32"},
        activation_roles={"ssm_out": "static-int8", "ssm_x_proj": "static-int8"},
        rotate=["ssm_out", "ssm_x_proj"],
    ),
    "bf16 of float32": case(EQUAL, "bf16", "float32"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {name: make_jamba(root / name, spread=0.7, **changes) for name, changes in SOURCES.items()}


@pytest.fixture(scope="module")
def outputs(sources, tmp_path_factory):
    """The output folder of `apply` for a case, made once."""
    root, made = tmp_path_factory.mktemp("outputs"), {}

    def output(name: str) -> Path:
        if name not in made:
            made[name] = apply(sources[CASES[name].source], root / str(len(made)), CASES[name].options)
        return made[name]

    return output


def apply(source: Path, out: Path, options: dict) -> Path:
    overrides = ["check=null", "export=[]", f"passes.0.quantize={json.dumps(options)}"]
    if "static" in json.dumps(options):
        overrides.append("calibration={prompts: [self], samples: 4, length: 32}")
    pipeline.apply(pipeline.Job(load_recipe("tiny-int8", tuple(overrides)), resolve(str(source)), out))
    return out


def weights_only(folder: Path):
    """The checkpoint through our reader, its inputs left in floating point."""
    model = Checkpoint(folder, allow_quantized=True).model
    return replace(model, units=tuple(unit.map(lambda w: replace(w, activation=None)) for unit in model.units))


def our_logits(folder: Path, scratch: Path) -> torch.Tensor:
    model = weights_only(folder)
    ((_, hidden),) = stream(model, list(IDS), scratch)
    return Head(model, "cpu")(hidden)


def our_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What our reader gives under transformers' names: experts stacked [E, N, K], gate above up."""
    dense = {weight.name: weight.dense() for weight in Checkpoint(folder, allow_quantized=True).model.weights}
    result = fused(dense, EXPERTS)
    return {HEAD: result[EMBEDDING]} | result


def parameters(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False))


# ---- compress.load


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_near_the_original(outputs, sources, name):
    """Within the coarsest format's rounding; what is read as another format or rotation is as far off as it is large."""
    loaded = parameters(compress.load(outputs(name)))
    for key, original in our_weights(sources[CASES[name].source]).items():
        assert (loaded[key] - original).abs().max() <= 0.15 * original.abs().max(), key


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_that_of_our_reader_bit_for_bit(outputs, name, tmp_path):
    out = outputs(name)
    model, expected = compress.load(out), our_weights(out / "checkpoint")
    loaded = parameters(model)
    assert isinstance(model, JambaForCausalLM) and not model.training and loaded.keys() == expected.keys()
    for key, tensor in loaded.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[key]), key
    with torch.inference_mode():
        difference = model(IDS).logits - our_logits(out / "checkpoint", tmp_path)
    assert difference.abs().max() < 1e-4


def test_an_original_folder_loads_like_transformers_loads_it(sources):
    loaded, expected = parameters(compress.load(sources["fit"])), parameters(
        AutoModelForCausalLM.from_pretrained(sources["fit"], dtype=torch.float32)
    )  # fmt: skip
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.items())


def test_the_checkpoint_folder_itself_may_be_named(outputs):
    assert compress.load(str(outputs("int8") / "checkpoint")).config.num_experts == EXPERTS


def test_another_dtype_is_that_of_every_parameter(outputs):
    out = outputs("int4-g32, no dt")
    model, expected = compress.load(out, dtype=torch.bfloat16), our_weights(out / "checkpoint")
    assert model.dtype == torch.bfloat16
    for key, tensor in parameters(model).items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, expected[key].to(torch.bfloat16)), key
    assert model(IDS).logits.dtype == torch.bfloat16


def test_tied_embeddings_are_one_tensor(outputs):
    model = compress.load(outputs("int8, tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generate_goes_on_with_the_most_likely_tokens(outputs, tmp_path):
    out = outputs("int4-g32, dt falls back")
    ids = compress.load(out).generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert ids.shape == (1, IDS.shape[1] + 4)
    assert ids[0, IDS.shape[1]] == our_logits(out / "checkpoint", tmp_path)[0, -1].argmax()


def test_the_generation_config_of_the_folder_is_used(outputs, tmp_path):
    folder = shutil.copytree(outputs("int8") / "checkpoint", tmp_path / "copy")
    GenerationConfig(max_new_tokens=7, eos_token_id=[5, 6]).save_pretrained(folder)
    found = compress.load(folder).generation_config
    assert (found.max_new_tokens, found.eos_token_id) == (7, [5, 6])


def test_what_was_loaded_can_be_saved_as_a_plain_model(outputs, tmp_path):
    out = outputs("int4-g32, dt falls back")
    compress.load(out).save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    expected = our_weights(out / "checkpoint")
    for key, tensor in our_weights(tmp_path / "plain").items():
        assert torch.equal(tensor, expected[key]), key


def test_importing_compress_does_not_import_torch():
    code = "import sys, compress; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what cannot be loaded


@pytest.fixture
def copy(outputs, tmp_path) -> Path:
    """A copy of a checkpoint, one file, that a test may damage."""
    folder = outputs("int8") / "checkpoint"
    save_file({k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()},
              tmp_path / "model.safetensors")  # fmt: skip
    shutil.copy(folder / "config.json", tmp_path)
    return tmp_path


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert str(tmp_path / "nothing") in refusal(lambda: compress.load(tmp_path / "nothing"))


def test_a_folder_without_a_checkpoint_is_named(tmp_path):
    assert str(tmp_path) in refusal(lambda: compress.load(tmp_path))


def test_an_unfinished_output_is_refused(outputs, tmp_path):
    shutil.copytree(outputs("int8"), tmp_path / "out", ignore=shutil.ignore_patterns("manifest.json"))
    assert str(tmp_path / "out") in refusal(lambda: compress.load(tmp_path / "out"))


@pytest.mark.parametrize("named", ["", "model.onnx"])
def test_an_onnx_artifact_is_refused(tmp_path, named):
    (tmp_path / "model.onnx").touch()
    assert "ONNX" in refusal(lambda: compress.load(tmp_path / named))


def test_a_truncated_file_is_named(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-100])
    assert str(copy / "model.safetensors") in refusal(lambda: compress.load(copy))


def test_a_scale_that_is_not_a_number_is_named(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors[EMBEDDING + "_scale"][0] = float("nan")
    save_file(tensors, copy / "model.safetensors")
    assert f"{EMBEDDING}_scale" in refusal(lambda: compress.load(copy))


def test_a_config_transformers_does_not_take_is_named(copy):
    config = json.loads((copy / "config.json").read_text()) | {"output_router_logits": "perhaps"}
    (copy / "config.json").write_text(json.dumps(config))
    assert str(copy / "config.json") in refusal(lambda: compress.load(copy))


def test_a_damaged_generation_config_is_named(copy):
    (copy / "generation_config.json").write_text("{")
    assert str(copy / "generation_config.json") in refusal(lambda: compress.load(copy))


FINAL, FIRST = "model.final_layernorm.weight", "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("places, named", [
    ({FINAL: "model.norm.weight"}, "no parameter 'model.norm.weight'"),
    ({FINAL: FIRST}, f"'{FIRST}' and '{FINAL}' have the same place"),
    ({FINAL: EMBEDDING, EMBEDDING: FINAL}, f"'{EMBEDDING}' is"),  # another shape
])  # fmt: skip
def test_a_tensor_without_a_place_of_its_own_is_named(copy, monkeypatch, places, named):
    def misplaced(family, name):
        return Place(places[name]) if name in places else place_of(family, name)

    place_of = jamba.Jamba.transformers_place
    monkeypatch.setattr(jamba.Jamba, "transformers_place", misplaced)
    with pytest.raises(WorkError, match=named):
        compress.load(copy)


def test_a_parameter_that_no_tensor_fills_is_named(copy, monkeypatch):
    """As with a transformers that gives Jamba a parameter which checkpoints do not have."""
    empty_model = loading._empty_model

    def larger(*arguments):
        model = empty_model(*arguments)
        model.model.extra = torch.nn.Parameter(torch.empty(2))
        return model

    monkeypatch.setattr(loading, "_empty_model", larger)
    with pytest.raises(WorkError, match=r"'model\.extra' was not filled"):
        compress.load(copy)


# ---- stock transformers


def stock_weights(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return parameters(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_loads_it_or_stops(outputs, name):
    folder, stock = outputs(name) / "checkpoint", CASES[name].stock
    if stock == REFUSED:
        with pytest.raises((RuntimeError, AttributeError, ValueError)):
            stock_weights(folder, torch.float32)
        return
    loaded, expected = stock_weights(folder, torch.float32), our_weights(folder)
    assert loaded.keys() == expected.keys()
    others = [key for key, tensor in loaded.items() if not torch.equal(tensor.float(), expected[key])]
    if stock == ROUNDED:
        assert others
        others = [key for key in others if not as_rounded(loaded[key], expected[key])]
    assert not others


def as_rounded(loaded: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(loaded.float(), expected.to(torch.bfloat16).float())


@pytest.mark.parametrize("name", CASES)
def test_what_stock_transformers_does_is_told_from_formats(outputs, name):
    row, ours = runtimes.of_checkpoint(Checkpoint(outputs(name) / "checkpoint", allow_quantized=True).model)
    assert (row.name, row.loads) == ("transformers", CASES[name].stock != REFUSED)
    assert (row.why is None) == row.loads
    assert (ours.name, ours.loads) == ("compress.load", True)


@pytest.mark.parametrize("name", ["int8", "int4-g32, no dt", "fp8"])
def test_in_bfloat16_stock_transformers_gives_ours_rounded(outputs, name):
    folder = outputs(name) / "checkpoint"
    expected = our_weights(folder)
    for key, tensor in stock_weights(folder, torch.bfloat16).items():
        assert torch.equal(tensor.to(torch.bfloat16), expected[key].to(torch.bfloat16)), key
