"""`apply`: the folder it writes, against the contract and against the source model read with other libraries."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from jamba_models import load_reference, make_jamba
from onnx import TensorProto
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import JambaForCausalLM

import compress
from compress.recipe import resources
from compress.recipe.check import METRICS
from compress.recipe.recipe import load_recipe

QUICK = ("--set", "check=null")
PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ONNX_FORMATS = {TensorProto.INT8: "int8", TensorProto.FLOAT: "fp32", TensorProto.BFLOAT16: "bf16"}
INT8_MOST, INT8_LEAST = 127, -127


@pytest.fixture
def quick(compress_cli, small, tmp_path):
    """Applies the quick-start recipe, check off, to the small model; returns the output folder."""

    def apply(*arguments, recipe="tiny-int8", model=small, name="out", check=QUICK) -> Path:
        given = ("-m", model) if model else ()
        result = compress_cli("apply", recipe, *given, "-o", tmp_path / name, *check, *arguments)
        assert result.exit_code == 0, result.output
        return tmp_path / name

    return apply


@pytest.fixture(scope="module")
def stored(applied) -> dict[str, torch.Tensor]:
    """Every tensor of the written checkpoint, by the name it is stored under."""
    shards = sorted((applied / "checkpoint").glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.fixture(scope="module")
def original(tiny) -> dict[str, torch.Tensor]:
    return load_file(tiny / "model.safetensors")


@pytest.fixture(scope="module")
def initializers(applied) -> dict[str, TensorProto]:
    """Every weight in the data file of the exported graph, those of subgraphs too."""
    model = onnx.load(applied / "onnx" / "model.onnx", load_external_data=False)
    return {
        tensor.name: tensor
        for graph in graphs_of(model.graph)
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }


def graphs_of(graph: onnx.GraphProto):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from graphs_of(inner)


def location(tensor: TensorProto) -> tuple[int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries["offset"]), int(entries["length"])


def values_of(tensor: TensorProto, folder: Path) -> np.ndarray:
    offset, length = location(tensor)
    data = (folder / "model.onnx.data").read_bytes()[offset : offset + length]
    dtype = {TensorProto.INT8: np.int8, TensorProto.FLOAT: np.float32}[tensor.data_type]
    return np.frombuffer(data, dtype).reshape(tuple(tensor.dims))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files_below(folder)}


TOKENIZER = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja"}


def test_the_output_holds_the_files_that_the_contract_names(applied):
    names = files_below(applied)
    assert {"manifest.json", "recipe.yaml", "recipe.resolved.yaml", "report.json", "report.md"} <= names
    assert {"checkpoint/config.json", "checkpoint/model.safetensors.index.json", "checkpoint/README.md"} <= names
    assert {f"onnx/{name}" for name in ("model.onnx", "model.onnx.data", "genai_config.json")} <= names
    for folder in ("checkpoint", "onnx"):
        assert {f"{folder}/{name}" for name in TOKENIZER | {"generation_config.json"}} <= names


def test_nothing_of_the_work_is_left_in_the_output(applied):
    assert not [name for name in files_below(applied) if name.endswith((".tmp", ".partial")) or "journal" in name]
    assert [path.name for path in applied.parent.iterdir()] == [applied.name]


def test_the_companions_of_the_source_arrive_unchanged(applied, tiny):
    for name in TOKENIZER | {"generation_config.json"}:
        assert (applied / "checkpoint" / name).read_bytes() == (tiny / name).read_bytes()
        assert (applied / "onnx" / name).read_bytes() == (tiny / name).read_bytes()


def test_the_configuration_is_the_source_s_with_two_sections_more(applied, tiny):
    written = read_json(applied / "checkpoint" / "config.json")
    section, done = written.pop("quantization_config"), written.pop("compress")
    assert written == read_json(tiny / "config.json")
    assert section["quant_method"] == "compressed-tensors"
    assert [record["name"] for record in done.pop("passes")] == ["quantize"]
    assert not done


def test_the_index_lists_every_tensor_in_the_shard_that_holds_it(applied):
    weight_map = read_json(applied / "checkpoint" / "model.safetensors.index.json")["weight_map"]
    held = {}
    for shard in (applied / "checkpoint").glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            held |= dict.fromkeys(file.keys(), shard.name)
    assert weight_map == held


def test_the_recipe_is_kept_verbatim_and_resolved(applied):
    assert (applied / "recipe.yaml").read_bytes() == resources.find_recipe("tiny-int8").read_bytes()
    resolved = load_recipe(str(applied / "recipe.resolved.yaml"))
    assert resolved.resolved_yaml() == load_recipe("tiny-int8", ("check=null",)).resolved_yaml()


def test_a_recipe_with_carriage_returns_is_kept_verbatim_too(quick, tmp_path):
    text = b"version: 1\r\npasses:\r\n  - quantize: {}   # all of it\r\n"
    (tmp_path / "recipe.yaml").write_bytes(text)
    assert (quick(recipe=tmp_path / "recipe.yaml") / "recipe.yaml").read_bytes() == text


def test_the_manifest_lists_every_file_with_its_bytes_and_digest(applied):
    files = read_json(applied / "manifest.json")["files"]
    assert set(files) == files_below(applied) - {"manifest.json"}
    for name, entry in files.items():
        content = (applied / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_manifest_names_the_seed_and_the_versions(quick):
    manifest = read_json(quick("--seed", 7) / "manifest.json")
    assert manifest["seed"] == 7
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["onnx"] == onnx.__version__
    assert {"compress", "onnxruntime", "transformers"} <= set(manifest["versions"])


def test_the_manifest_gives_the_format_of_every_tensor_as_the_shards_hold_it(applied, stored, original):
    formats = read_json(applied / "manifest.json")["tensors"]["checkpoint"]
    assert set(formats) == set(original)
    accounted = set()
    for name, stored_as in formats.items():
        if stored_as == "int8":
            packed = {name.removesuffix("weight") + part for part in ("weight_packed", "weight_scale", "weight_shape")}
            assert packed <= set(stored)
            assert stored[name.removesuffix("weight") + "weight_packed"].dtype == torch.int32
            accounted |= packed
        else:
            assert stored_as == PLAIN[stored[name].dtype]
            accounted.add(name)
    assert accounted == set(stored)


def test_the_manifest_gives_the_format_of_every_weight_as_the_graph_holds_it(applied, initializers):
    formats = read_json(applied / "manifest.json")["tensors"]["onnx"]
    held = {name: ONNX_FORMATS[t.data_type] for name, t in initializers.items() if not name.endswith("_scale")}
    assert formats == held


def test_every_matrix_is_within_half_a_step_of_the_original(stored, original):
    for name, weight in unpacked(stored, original):
        scales = stored[name.removesuffix("weight") + "weight_scale"].numpy()
        values = original[name].float().numpy()
        largest = np.abs(values).max(axis=1)
        assert np.array_equal(scales[:, 0], np.where(largest > 0, largest / np.float32(INT8_MOST), 1)), name
        assert weight.min() >= INT8_LEAST and weight.max() <= INT8_MOST
        # rounding to nearest errs by half a step at most; dividing by the scale in float32 adds some 1e-7 of 127 steps
        assert np.abs(values / scales - weight).max() <= 0.5 + 1e-4, name


def unpacked(stored, original):
    """(name, int8 values [N, K]) of every packed matrix, unpacked with numpy: four to an int32, offset by 128."""
    for name in original:
        packed = stored.get(name.removesuffix("weight") + "weight_packed")
        if packed is not None:
            unsigned = packed.numpy().view(np.uint8)[:, : original[name].shape[1]]
            yield name, unsigned.astype(np.int16) - 128


def test_what_is_not_quantized_is_bit_for_bit_the_original(stored, original):
    plain = set(stored) & set(original)
    assert len(plain) > 0
    for name in plain:
        assert torch.equal(stored[name], original[name]), name


def test_the_graph_holds_the_very_integers_and_scales_of_the_checkpoint(applied, stored, original, initializers):
    for name, weight in unpacked(stored, original):
        exported = values_of(initializers[name], applied / "onnx")
        same = exported if exported.shape == weight.shape and "embed" in name else exported.T  # products are [K, N]
        assert np.array_equal(same, weight), name
        scales = values_of(initializers[f"{name}_scale"], applied / "onnx")
        assert np.array_equal(scales, stored[name.removesuffix("weight") + "weight_scale"].numpy()[:, 0]), name


def test_the_quick_start_stores_nearly_all_parameters_in_int8(applied, original):
    formats = read_json(applied / "manifest.json")["tensors"]
    total = sum(tensor.numel() for tensor in original.values())
    for artifact in ("checkpoint", "onnx"):
        int8 = sum(original[name].numel() for name, stored_as in formats[artifact].items() if stored_as == "int8")
        assert int8 >= 0.99 * total


def test_the_quick_start_takes_little_more_than_a_quarter_of_float32(applied, original):
    float32 = 4 * sum(tensor.numel() for tensor in original.values())
    for artifact in read_json(applied / "report.json")["artifacts"]:
        assert artifact["weight_bytes"] <= 0.28 * float32
        assert artifact["bytes"] <= 0.28 * float32


def test_the_report_describes_the_source_model(applied, tiny, original):
    model = read_json(applied / "report.json")["model"]
    total = sum(tensor.numel() for tensor in original.values())
    experts = sum(tensor.numel() for name, tensor in original.items() if ".experts." in name)
    assert model == {
        "name": "tiny-jamba",
        "revision": None,
        "weights_sha256": hashlib.sha256((tiny / "model.safetensors").read_bytes()).hexdigest(),
        "model_type": "jamba",
        "parameters": total,
        "active_parameters": total - experts * 6 // 8,  # two of eight experts work on a token
    }


def test_the_report_counts_every_stored_byte_of_the_checkpoint(applied, tiny, stored, original):
    report = read_json(applied / "report.json")
    parameters = sum(tensor.numel() for tensor in original.values())
    weights = sum(tensor.nbytes for tensor in stored.values())
    artifact = next(a for a in report["artifacts"] if a["kind"] == "checkpoint")
    assert artifact["weight_bytes"] == weights
    assert artifact["bits_per_weight"] == pytest.approx(8 * weights / parameters)
    needed = ("*.safetensors", "config.json", "generation_config.json", "model.safetensors.index.json")
    total = sum(path.stat().st_size for pattern in needed for path in (applied / "checkpoint").glob(pattern))
    assert (artifact["bytes"], artifact["graph_bytes"]) == (total, total - weights)
    assert report["size"]["baseline_bytes"] == (tiny / "model.safetensors").stat().st_size
    assert report["size"]["baseline_float32_bytes"] == 4 * parameters


def test_the_report_counts_every_stored_byte_of_the_graph(applied, initializers, original):
    artifact = next(a for a in read_json(applied / "report.json")["artifacts"] if a["kind"] == "onnx")
    weights = sum(location(tensor)[1] for tensor in initializers.values())
    needed = ("model.onnx", "model.onnx.data", "genai_config.json")
    total = sum((applied / "onnx" / name).stat().st_size for name in needed)
    assert artifact["path"] == "onnx/model.onnx"
    assert artifact["weight_bytes"] == weights
    assert (artifact["bytes"], artifact["graph_bytes"]) == (total, total - weights)
    parameters = sum(tensor.numel() for tensor in original.values())
    assert artifact["bits_per_weight"] == pytest.approx(8 * weights / parameters)


def test_the_size_in_the_report_is_that_of_the_smallest_artifact(applied):
    report = read_json(applied / "report.json")
    smallest = min(report["artifacts"], key=lambda artifact: artifact["weight_bytes"])
    assert report["size"]["candidate_bytes"] == smallest["weight_bytes"]
    assert report["size"]["bits_per_weight"] == smallest["bits_per_weight"]


def test_the_report_tells_what_each_pass_did(applied, original):
    (entry,) = read_json(applied / "report.json")["passes"]
    assert entry["name"] == "quantize"
    assert entry["seconds"] > 0
    assert entry["peak_rss_bytes"] > 0
    assert entry["details"]["method"] == "rtn"
    assert entry["details"]["layers_reused"] == 0
    formats = entry["details"]["formats"]
    assert set(formats) == {"int8", "bf16"}
    assert sum(f["tensors"] for f in formats.values()) == len(original)
    assert sum(f["parameters"] for f in formats.values()) == sum(tensor.numel() for tensor in original.values())


def test_a_run_without_a_check_says_so(applied):
    report = read_json(applied / "report.json")
    assert (report["schema"], report["verdict"], report["checks"]) == (1, "not_checked", [])
    assert "not checked" in (applied / "report.md").read_text()


def test_the_report_for_people_names_every_artifact_and_the_verdict(applied):
    text = (applied / "report.md").read_text()
    for artifact in read_json(applied / "report.json")["artifacts"]:
        assert artifact["path"] in text
        assert f"{artifact['bytes']:,}" in text
        assert f"- Loads in: {artifact['kind']}: " in text


CHECK = {"prompts": "[self]", "samples": "2", "length": "16", "limits": "{kl_divergence_mean: 100}"}


def test_the_report_has_a_row_for_each_artifact_metric_and_phase(quick):
    report = read_json(quick(check=[a for k, v in CHECK.items() for a in ("--set", f"check.{k}={v}")]) / "report.json")
    rows = [row for row in report["checks"] if row["prompts"] == "all"]
    not_told = {"decode_drift_ratio", "recall_accuracy_drop", "task_accuracy_drop"}  # by short windows of no questions
    metrics = [metric for name, metric in METRICS.items() if name not in not_told]
    expected = {(a, metric.name, p) for a in ("checkpoint", "onnx") for metric in metrics for p in metric.phases}
    assert {(row["artifact"], row["metric"], row["phase"]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert report["verdict"] == "pass"
    assert report["prompts"] == [{"name": "self", "windows": 2, "tokens": 32}]
    for row in report["checks"]:
        bound = row["prompts"] == "all" and row["metric"] == "kl_divergence_mean"
        assert (row["limit"], row["passed"]) == ((100.0, True) if bound else (None, None))


def test_the_same_recipe_twice_writes_the_same_bytes(quick):
    first, second = quick(name="first"), quick(name="second")
    for folder in ("checkpoint", "onnx"):
        assert digests(first / folder) == digests(second / folder)


def test_a_recipe_without_exports_writes_and_checks_the_checkpoint_only(quick):
    settings = [a for k, v in CHECK.items() for a in ("--set", f"check.{k}={v}")]
    out = quick("--set", "export=[]", check=settings)
    report = read_json(out / "report.json")
    assert not (out / "onnx").exists()
    assert [artifact["kind"] for artifact in report["artifacts"]] == ["checkpoint"]
    assert {row["artifact"] for row in report["checks"]} == {"checkpoint"}
    assert set(read_json(out / "manifest.json")["tensors"]) == {"checkpoint"}


def test_a_recipe_without_passes_writes_the_weights_as_they_came(quick, small):
    out = quick("--set", "passes=[]", "--set", "export=[]")
    stored = {k: v for shard in (out / "checkpoint").glob("*.safetensors") for k, v in load_file(shard).items()}
    source = load_file(small / "model.safetensors")
    assert set(stored) == set(source)
    assert all(torch.equal(stored[name], source[name]) for name in source)
    assert "quantization_config" not in read_json(out / "checkpoint" / "config.json")


def test_roles_take_the_format_that_the_recipe_gives_them(quick):
    out = quick("--set", "passes.0.quantize.roles={lm_head: none, experts: none}")
    formats = read_json(out / "manifest.json")["tensors"]
    for artifact, plain in (("checkpoint", "bf16"), ("onnx", "bf16")):
        kept = {n: f for n, f in formats[artifact].items() if "lm_head" in n or ".experts." in n}
        assert kept
        assert set(kept.values()) == {plain}
        assert formats[artifact]["model.embed_tokens.weight"] == "int8"


def test_a_default_of_none_quantizes_only_the_roles_that_are_named(quick):
    out = quick("--set", "passes.0.quantize={weights: none, roles: {lm_head: int8}}")
    formats = read_json(out / "manifest.json")["tensors"]["checkpoint"]
    assert {name for name, stored_as in formats.items() if stored_as == "int8"} == {"lm_head.weight"}


@pytest.mark.parametrize("key", ["roles={experts: int4-g16}", "overrides=[{role: experts, layers: [1], weights: int8}]",
                                 "activation_roles={experts: dynamic-int8}", "rotate=[experts]"])  # fmt: skip
def test_a_role_that_the_model_does_not_have_is_said_by_plan_and_report(compress_cli, tmp_path, key):
    dense = make_jamba(tmp_path / "dense", num_experts=1)
    settings = (*QUICK, "--set", f"passes.0.quantize.{key}")
    arguments = ("apply", "tiny-int8", "-m", dense, "-o", tmp_path / "out", *settings)
    said = f"'experts' is named in {key.partition('=')[0]}, but this model has no tensors of that role"
    assert said in compress_cli(*arguments, "--dry-run").stdout
    assert compress_cli(*arguments).exit_code == 0
    assert said in (tmp_path / "out" / "report.md").read_text()
    (done,) = read_json(tmp_path / "out" / "report.json")["passes"]
    assert done["details"]["notes"] == [said]


DTYPES = {
    "all matrices": ({"weights": "bf16"}, torch.float32, {"dtype": "float32"}, {"dtype": "bfloat16"}),
    "to float16, under the older name": (
        {"weights": "fp16"}, torch.float32, {"torch_dtype": "float32"}, {"torch_dtype": "float16"}),
    "both names": (
        {"weights": "bf16"}, torch.float32, {"dtype": "float32", "torch_dtype": "float32"},
        {"dtype": "bfloat16", "torch_dtype": "bfloat16"}),
    "neither name": ({"weights": "bf16"}, torch.float32, {}, {"dtype": "bfloat16"}),
    "a wider type": ({"weights": "fp32"}, torch.bfloat16, {"dtype": "bfloat16"}, {"dtype": "float32"}),
    "two types that neither holds the other": (
        {"weights": "bf16", "roles": {"lm_head": "fp16"}}, torch.float32, {"dtype": "float32"}, {"dtype": "float32"}),
    "one beside float32": (
        {"weights": "bf16", "roles": {"lm_head": "none"}}, torch.float32, {"dtype": "float32"}, {"dtype": "float32"}),
    "some quantized, which are widened to what was named": (
        {"weights": "int8", "roles": {"lm_head": "bf16"}}, torch.float32, {"dtype": "float32"}, {"dtype": "float32"}),
    "all quantized": ({"weights": "int8"}, torch.float32, {"dtype": "float32"}, {"dtype": "float32"}),
    "nothing": ({"weights": "none"}, torch.bfloat16, {"dtype": "float32"}, {"dtype": "float32"}),
}  # fmt: skip


@pytest.mark.parametrize(("options", "dtype", "named", "expected"), DTYPES.values(), ids=list(DTYPES))
def test_config_names_the_type_that_the_matrices_have(quick, tmp_path, options, dtype, named, expected):
    model = make_jamba(tmp_path / "source", dtype)
    config = {k: v for k, v in read_json(model / "config.json").items() if k not in ("dtype", "torch_dtype")}
    (model / "config.json").write_text(json.dumps(config | named))
    out = quick("--set", f"passes.0.quantize={json.dumps(options)}", model=model)
    written = read_json(out / "checkpoint" / "config.json")
    assert {key: written[key] for key in ("dtype", "torch_dtype") if key in written} == expected


def test_the_report_says_that_norms_are_wider_than_the_type_that_config_names_now(quick, tmp_path):
    model = make_jamba(tmp_path / "source", torch.float32)
    out = quick("--set", "passes.0.quantize={weights: bf16}", model=model)
    stored = {n: t.dtype for p in (out / "checkpoint").glob("*.safetensors") for n, t in load_file(p).items()}
    wide = sum(dtype == torch.float32 for dtype in stored.values())
    assert JambaForCausalLM.from_pretrained(out / "checkpoint", dtype="auto").lm_head.weight.dtype == torch.bfloat16
    assert f"{wide} tensors are stored in a wider one" in (out / "report.md").read_text()
    assert torch.equal(
        compress.load(out).model.final_layernorm.weight.data, load_reference(model).model.final_layernorm.weight.data
    )


def test_a_model_on_the_command_line_overrides_the_recipe_s(quick, small):
    model = read_json(quick() / "report.json")["model"]
    assert model["weights_sha256"] == hashlib.sha256((small / "model.safetensors").read_bytes()).hexdigest()


def write_recipe(folder: Path, model: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(f"version: 1\nmodel: {model}\npasses: [quantize: {{}}]\n")
    return folder / "recipe.yaml"


def test_a_model_beside_the_recipe_goes_before_one_in_the_working_folder(quick, small, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "recipes", "mine")
    shutil.copytree(small, tmp_path / "recipes" / "mine")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_json(quick(recipe=recipe, model=None) / "report.json")["model"]["name"] == "mine"


def test_a_model_is_found_in_the_working_folder(quick, small, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "recipes", "mine")
    shutil.copytree(small, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert read_json(quick(recipe=recipe, model=None) / "report.json")["model"]["name"] == "mine"


def test_the_shipped_model_is_found_from_anywhere(compress_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "recipes", "models/tiny-jamba")
    result = compress_cli("apply", recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "tiny-jamba" in result.stdout


def test_licence_and_notice_travel_along(quick, small, tmp_path):
    model = Path(shutil.copytree(small, tmp_path / "model"))
    (model / "LICENSE").write_text("Do as you like.\n")
    (model / "NOTICE").write_text("Made by someone.\n")
    out = quick(model=model)
    for folder in ("checkpoint", "onnx"):
        assert (out / folder / "LICENSE").read_text() == "Do as you like.\n"
        assert (out / folder / "NOTICE").read_text() == "Made by someone.\n"


def test_code_and_pickles_beside_the_weights_do_not_travel_along(quick, small, tmp_path):
    model = Path(shutil.copytree(small, tmp_path / "model"))
    for name in ("modeling_jamba.py", "optimizer.pt", "training_args.bin"):
        (model / name).write_text("x")
    names = files_below(quick(model=model))
    assert not [name for name in names if name.endswith((".py", ".pt", ".bin"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_a_model_stored_in_another_precision_keeps_it_where_nothing_is_quantized(quick, tmp_path, dtype):
    model = make_jamba(tmp_path / "model", dtype=dtype)
    formats = read_json(quick(model=model) / "manifest.json")["tensors"]["checkpoint"]
    assert set(formats.values()) == {"int8", PLAIN[dtype]}


def test_a_sharded_source_gives_the_same_bytes_as_a_single_file(quick, small, tmp_path):
    sharded = make_jamba(tmp_path / "sharded", shards="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    shards = {p.name: p for p in (quick(model=sharded, name="a") / "checkpoint").glob("*.safetensors")}
    single = {p.name: p for p in (quick(model=small, name="b") / "checkpoint").glob("*.safetensors")}
    assert {n: p.read_bytes() for n, p in shards.items()} == {n: p.read_bytes() for n, p in single.items()}


PRUNED = ("--set", "export=[]", "--set", "calibration.prompts=[self]", "--set", "calibration.samples=4")
PRUNED = (*PRUNED, "--set", "calibration.length=37", "--set", "passes.0.prune_experts={keep: 2}", *QUICK)


@pytest.mark.parametrize("router", ["rescale", "keep_rows"])
def test_a_plan_names_the_very_bytes_that_pruning_leaves(quick, compress_cli, small, tmp_path, router):
    arguments = (*PRUNED, "--set", f"passes.0.prune_experts.router={router}")
    planned = compress_cli("apply", "prune-experts", "-m", small, "-o", tmp_path / "out", "--dry-run", *arguments)
    assert planned.exit_code == 0, planned.output
    out = quick(*PRUNED, "--set", f"passes.0.prune_experts.router={router}", recipe="prune-experts", check=())
    (artifact,) = json.loads((out / "report.json").read_text())["artifacts"]
    tensors = [tensor for shard in (out / "checkpoint").glob("*.safetensors") for tensor in load_file(shard).values()]
    assert artifact["weight_bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert f"checkpoint: about {artifact['weight_bytes']:,} bytes" in planned.stdout
    assert "prune_experts" in (out / "checkpoint" / "README.md").read_text()
