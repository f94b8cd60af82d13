"""Folders as people have them: links of a hub cache, git-lfs pointers, two models in one, names that are not UTF-8, several
end tokens."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from jamba_models import make_jamba
from refusals import refusal, refusal_of_command
from safetensors.torch import save_file
from text_models import changed_copy

from compress.apply import exporting
from compress.checkpoint import compressed_tensors, writer
from compress.checkpoint.end_tokens import end_tokens
from compress.checkpoint.folder import INDEX, SINGLE, WeightFolder
from compress.checkpoint.reader import Checkpoint
from compress.disk.paths import as_text
from compress.recipe.source import load_tokenizer, resolve
from compress.runtime.onnx_session import OnnxSession
from exporters.graph import reading

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 14787176\n"
PROMPT = "Once upon a time there was a fox who lived by the river, and"


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory) -> Path:
    return exporting.export_checkpoint(tiny, "onnx", tmp_path_factory.mktemp("exported") / "onnx")


def generated(compress_cli, artifact: Path, *arguments, told: str = "", **options) -> str:
    result = compress_cli("run", artifact, *(arguments or (PROMPT, "--max-tokens", 12)), **options)
    assert (result.exit_code, result.stderr) == (0, told), result.stderr
    return result.stdout


# ---- git-lfs pointers


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "tokenizer.model", "generation_config.json"])
def test_a_checkpoint_with_a_pointer_in_it_is_refused_by_file(compress_cli, tiny, tmp_path, name):
    model = changed_copy(tiny, tmp_path / "model", weights=True)
    (model / name).write_bytes(POINTER)
    for command in (("apply", "tiny-int8", "-m", model, "-o", tmp_path / "out"), ("run", model, "hello")):
        message = refusal_of_command(compress_cli(*command))
        assert str(model / name) in message and "git-lfs" in message
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_a_pointer_is_refused_by_name(tmp_path):
    model = make_jamba(tmp_path / "model", shards="20KB")
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(POINTER)
    message = refusal(lambda: Checkpoint(model))
    assert str(shard) in message and "git-lfs" in message


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "generation_config.json"])
def test_an_exported_folder_with_a_pointer_in_it_is_refused_by_file(compress_cli, exported, tmp_path, name):
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    (folder / name).write_bytes(POINTER)
    message = refusal_of_command(compress_cli("run", folder, "hello"))
    assert str(folder / name) in message and "git-lfs" in message


# ---- which weights are the model's


def test_one_file_beside_an_index_of_others_is_refused(tmp_path):
    model = make_jamba(tmp_path / "model", shards="20KB")
    shutil.copy(make_jamba(tmp_path / "single") / SINGLE, model)
    message = refusal(lambda: Checkpoint(model))
    assert SINGLE in message and INDEX in message and str(model) in message


def test_an_index_of_the_one_file_is_no_second_model(small, tmp_path):
    model = Path(shutil.copytree(small, tmp_path / "model"))
    names = Checkpoint(model).files.names
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE)}))
    assert Checkpoint(model).files.names == names


def test_tensors_are_looked_up_and_not_searched_however_many_there_are(tmp_path):
    """512 experts in 48 layers have 49,152 matrices; a search for each took minutes."""
    names = [f"layers.{number}.up_proj" for number in range(10_000)]
    save_file({f"{name}.weight_scale": torch.ones(1) for name in names}, tmp_path / SINGLE)
    began = time.process_time()
    files = WeightFolder(tmp_path)
    assert all(f"{name}.weight_scale" in files.names for name in names)
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    halves = {str(half): {"targets": names[half::2], "weights": int8} for half in (0, 1)}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": halves}}
    schemes = compressed_tensors.schemes_of(config, tmp_path, files.names)
    assert {scheme.format for scheme in schemes.values()} == {"int8"} and len(schemes) == len(names)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("groups", "found"),
    [
        ([("Linear", 8), ("re:.*up", 4), ("a.up", 8)], "int8"),  # a name wins over a pattern, wherever it stands
        ([("Linear", 8), ("re:.*up", 4)], "int4-g32"),  # a pattern over a class
        ([("re:b.*", 8), ("Linear", 4), ("Embedding", 8)], "int4-g32"),  # of two classes the first
        ([("a.up", 8), ("a.up", 4)], "int8"),
    ],
)
def test_the_nearest_target_says_how_a_matrix_is_stored(tmp_path, groups, found):
    weights = {
        8: {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        4: {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
    }
    described = {str(n): {"targets": [target], "weights": weights[bits]} for n, (target, bits) in enumerate(groups)}
    config = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": described}}
    [scheme] = compressed_tensors.schemes_of(config, tmp_path, ["a.up.weight_scale"]).values()
    assert scheme.format == found


def test_a_configuration_with_a_byte_order_mark_is_read(small, tmp_path):
    model = Path(shutil.copytree(small, tmp_path / "model"))
    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + (small / "config.json").read_bytes())
    assert Checkpoint(model).config == Checkpoint(small).config


# ---- links


def snapshot_of(folder: Path, cache: Path, *, shared: tuple[str, ...] = ()) -> Path:
    """The folder as the hub's cache holds it; files named in `shared` lie in the store that repositories share."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        if path.name in shared:
            store = cache / "blobs" / "ab"
            store.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, store / f"{number:064x}")
            blob.symlink_to(f"../../blobs/ab/{number:064x}")
        else:
            shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared", [(), ("model.onnx.data",), ("model.onnx.data", "model.onnx")])
def test_an_exported_folder_in_a_hub_cache_runs(compress_cli, exported, tmp_path, shared):
    snapshot = snapshot_of(exported, tmp_path, shared=shared)
    assert generated(compress_cli, snapshot) == generated(compress_cli, exported)
    facts = [compress_cli("inspect", folder, "--json").stdout for folder in (snapshot, exported)]
    assert facts[0] == facts[1]


def test_weights_that_are_a_link_to_anywhere_run(compress_cli, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    shutil.move(folder / "model.onnx.data", tmp_path / "large.bin")
    (folder / "model.onnx.data").symlink_to("../large.bin")
    assert generated(compress_cli, folder) == generated(compress_cli, exported)


def test_the_memory_that_links_will_take_is_counted(exported, tmp_path, monkeypatch):
    snapshot = snapshot_of(exported, tmp_path, shared=("model.onnx.data",))
    size = (exported / "model.onnx.data").stat().st_size
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": size}))
    assert "GiB of memory" in refusal(lambda: OnnxSession(snapshot / "model.onnx"))


def test_a_graph_that_names_a_file_elsewhere_reads_nothing_there(compress_cli, exported, tmp_path):
    """Only links beside the model are followed, not what the graph itself says."""
    folder = Path(shutil.copytree(exported, tmp_path / "onnx"))
    shutil.move(folder / "model.onnx.data", tmp_path / "model.onnx.daty")
    raw = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(raw.replace(b"model.onnx.data", b"../model.x.daty"))
    shutil.move(tmp_path / "model.onnx.daty", tmp_path / "model.x.daty")
    (folder / "link").symlink_to("model.onnx")
    assert str(folder) in refusal_of_command(compress_cli("run", folder, "hello"))


SECRET = "nobody's business"


@pytest.fixture
def linked(tiny, tmp_path) -> Path:
    """A model whose licence and card are links to a file outside, and whose notice is one to a file inside."""
    model = changed_copy(tiny, tmp_path / "linked", weights=True)
    (tmp_path / "secret").write_text(SECRET)
    (model / "TERMS").write_text("terms")
    (model / "NOTICE").symlink_to("TERMS")
    for name in ("LICENSE", "README.md"):
        (model / name).symlink_to(tmp_path / "secret")
    return model


def test_a_link_out_of_the_folder_is_not_published(compress_cli, linked, tmp_path):
    out = tmp_path / "out"
    result = compress_cli("apply", "tiny-int8", "-m", linked, "-o", out, "--set", "check=null")
    assert result.exit_code == 0, result.stderr
    written = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert not [name for name, raw in written.items() if SECRET.encode() in raw]
    assert {"checkpoint/LICENSE", "onnx/LICENSE"}.isdisjoint(written)
    assert written["checkpoint/NOTICE"] == written["onnx/NOTICE"] == b"terms"
    for told in (result.stderr, (out / "report.md").read_text()):
        assert "'LICENSE' is a link" in told and "'README.md' is a link" in told


def test_companions_of_a_hub_snapshot_travel_as_files(tiny, tmp_path):
    source = changed_copy(tiny, tmp_path / "source")
    (source / "LICENSE").write_text("Apache")
    snapshot = snapshot_of(source, tmp_path / "cache", shared=("tokenizer.model",))
    (snapshot / "NOTICE").symlink_to("/etc/hostname")
    target = tmp_path / "target"
    target.mkdir()
    writer.copy_companions(snapshot, target)
    names = {path.name for path in source.iterdir()} - {"config.json"}
    assert {path.name for path in target.iterdir()} == names
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert not any(path.is_symlink() for path in target.iterdir())


def test_a_link_into_a_hub_cache_is_published(tiny, tmp_path):
    snapshot = snapshot_of(changed_copy(tiny, tmp_path / "source"), tmp_path / "cache")
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").symlink_to(snapshot / "tokenizer.json")
    assert [path.name for path in writer.companion_files(model)] == ["tokenizer.json"]


def test_code_that_is_not_shipped_is_not_named(compress_cli, tiny, tmp_path):
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_jamba.JambaForCausalLM"}}
    model = changed_copy(tiny, tmp_path / "model", weights=True, config=code, tokenizer_config=code)
    out = tmp_path / "out"
    assert compress_cli("apply", "tiny-int8", "-m", model, "-o", out, "--set", "check=null").exit_code == 0
    exporting.export_checkpoint(model, "onnx", tmp_path / "onnx")
    for path in [*out.rglob("*.json"), *tmp_path.glob("onnx/*.json")]:
        assert "auto_map" not in path.read_text(), path
    for path in (out / "onnx" / "model.onnx", tmp_path / "onnx" / "model.onnx"):
        assert "auto_map" not in reading.load(path).metadata_props[reading.CONFIG_KEY]
    kept = json.loads((out / "checkpoint" / "tokenizer_config.json").read_text())
    assert kept == json.loads((tiny / "tokenizer_config.json").read_text())


def test_numbers_that_json_does_not_have_reach_the_written_configurations_as_they_came(compress_cli, tiny, tmp_path):
    ours = {"time_step_limit": [0.0, float("inf")]}  # as Nemotron-H's config.json has it
    theirs = {"auto_map": {"": "code"}, "model_max_length": float("inf")}  # written anew, as it names code
    model = changed_copy(tiny, tmp_path / "model", weights=True, config=ours, tokenizer_config=theirs)
    arguments = ("-o", tmp_path / "out", "--set", "check=null")
    assert compress_cli("apply", "tiny-int8", "-m", model, *arguments).exit_code == 0
    written = tmp_path / "out" / "checkpoint"
    assert json.loads((written / "config.json").read_text())["time_step_limit"] == ours["time_step_limit"]
    assert json.loads((written / "tokenizer_config.json").read_text())["model_max_length"] == float("inf")
    graph = reading.load(tmp_path / "out" / "onnx" / "model.onnx")
    assert json.loads(graph.metadata_props[reading.CONFIG_KEY])["time_step_limit"] == ours["time_step_limit"]


# ---- names that are not UTF-8


@pytest.mark.parametrize("name, shown", [
    ("plain", "plain"), ("naïve 日本", "naïve 日本"), (os.fsdecode(b"caf\xe9"), r"caf\xe9"), ("a\ud800", r"a\ud800"),
])  # fmt: skip
def test_a_name_is_shown_as_text(name, shown):
    assert as_text(name) == shown


def test_a_model_in_a_folder_whose_name_is_not_utf_8_works_from_end_to_end(compress_cli, tiny, tmp_path):
    model = changed_copy(tiny, tmp_path / os.fsdecode(b"mod\xe9l"), weights=True)
    out = tmp_path / os.fsdecode(b"\xff-out")
    settings = ("check.samples=1", "check.length=32", "check.prompts=[heldout]", "check.on_undecided=pass")
    result = compress_cli("apply", "tiny-int8", "-m", model, "-o", out, *(a for s in settings for a in ("--set", s)))
    assert result.exit_code == 0, result.stderr
    assert json.loads((out / "report.json").read_text())["model"]["name"] == r"mod\xe9l"
    assert (out / "report.md").read_text().startswith(r"# mod\\xe9l: undecided"), "Markdown shows \\xe9"
    told = rf"compress: {tmp_path}/\xff-out/onnx/model.onnx (int8, onnxruntime)" + "\n"
    assert generated(compress_cli, model) and generated(compress_cli, out, told=told)
    assert compress_cli("inspect", out).exit_code == 0
    checked = compress_cli("check", model, out, "--samples", 1, "--length", 16, "--json", "-")
    assert json.loads(checked.stdout)["candidate"].endswith(r"\xff-out")
    exported = exporting.export_checkpoint(out / "checkpoint", "onnx", tmp_path / os.fsdecode(b"\xfe"))
    assert generated(compress_cli, exported) == generated(compress_cli, out, told=told)


def test_the_source_is_called_by_a_name_that_can_be_written(tiny, tmp_path):
    model = changed_copy(tiny, tmp_path / os.fsdecode(b"mod\xe9l"))
    assert resolve(str(model)).name == r"mod\xe9l"
    assert load_tokenizer(model)("fox", add_special_tokens=False)["input_ids"]


# ---- prompts on the command line and on standard input


def test_a_prompt_argument_that_is_not_utf_8_is_refused(compress_cli, tiny):
    assert "prompt" in refusal_of_command(compress_cli("run", tiny, os.fsdecode(b"caf\xe9")))


@pytest.mark.parametrize("raw", [b"\xef\xbb\xbfOnce upon\na time", b"Once upon\r\na time"])
def test_standard_input_with_a_byte_order_mark_or_carriage_returns_says_the_same(compress_cli, tiny, raw):
    expected = generated(compress_cli, tiny, "-", "--max-tokens", 6, input=b"Once upon\na time")
    assert generated(compress_cli, tiny, "-", "--max-tokens", 6, input=raw) == expected


def test_a_prompt_that_begins_with_bos_gets_no_second_one(compress_cli, tiny):
    assert generated(compress_cli, tiny, "<s>" + PROMPT, "--max-tokens", 12) == generated(compress_cli, tiny)


def test_a_prompt_too_long_for_the_model_is_warned_of(compress_cli, tiny, tmp_path):
    model = changed_copy(tiny, tmp_path / "model", weights=True, config={"max_position_embeddings": 16})
    result = compress_cli("run", model, PROMPT, "--max-tokens", 3)
    assert result.exit_code == 0 and result.stdout.strip()
    assert "max_position_embeddings" in result.stderr and len(result.stderr.splitlines()) == 1


# ---- end tokens


def first_tokens(tiny: Path, text: str) -> list[int]:
    return load_tokenizer(tiny)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("where", ["config", "generation_config", "tokenizer_config"])
def test_every_end_token_of_a_model_ends_its_text(compress_cli, tiny, tmp_path, where):
    """An end token is made of one that greedy generation says."""
    whole = generated(compress_cli, tiny)
    ids = first_tokens(tiny, whole)
    end = next(token for token in ids[3:] if token not in ids[:3])
    piece = load_tokenizer(tiny).convert_ids_to_tokens(end)
    changes = (
        {"tokenizer_config": {"eos_token": piece}}
        if where == "tokenizer_config"
        else {where: {"eos_token_id": [2, end]}}
    )
    model = changed_copy(tiny, tmp_path / "model", weights=True, **changes)
    graph = exporting.export_checkpoint(model, "onnx", tmp_path / "onnx")
    for artifact in (model, graph):
        text = generated(compress_cli, artifact)
        assert whole.startswith(text.rstrip("\n")) and len(first_tokens(tiny, text)) < len(ids) - 1
    assert json.loads((graph / "genai_config.json").read_text())["model"]["eos_token_id"] == [2, end]


def test_end_tokens_are_joined_each_once(tiny, tmp_path):
    model = changed_copy(
        tiny, tmp_path / "model", config={"eos_token_id": 2}, generation_config={"eos_token_id": [5, 2, 9]}
    )
    config = Checkpoint(tiny).model.config
    assert end_tokens(config, model) == [2, 5, 9]
    assert end_tokens(config, model, load_tokenizer(model)) == [2, 5, 9]


@pytest.mark.parametrize(
    "given, expected", [(2, [2]), (None, [2]), (7, [2, 7]), ([], [2]), (-1, [2]), ([2048, 7], [2, 7])]
)
def test_a_generation_config_may_name_one_end_token_or_none(tiny, tmp_path, given, expected):
    model = changed_copy(tiny, tmp_path / "model", generation_config={"eos_token_id": given})
    assert end_tokens(Checkpoint(tiny).model.config, model) == expected


@pytest.mark.parametrize("given", ["2", [2, "5"], 2.0, True, {"id": 2}])
def test_an_end_token_that_is_no_id_is_refused_before_any_work(compress_cli, tiny, tmp_path, given):
    model = changed_copy(tiny, tmp_path / "model", weights=True, generation_config={"eos_token_id": given})
    for command in (("run", model, "hello"), ("apply", "tiny-int8", "-m", model, "-o", tmp_path / "out", "--dry-run")):
        message = refusal_of_command(compress_cli(*command))
        assert "generation_config.json" in message and "eos_token_id" in message
