"""Damage to what `apply` wrote is noticed: digests by `check` and `inspect --verify`, presence and size by every reader."""

import json
import os
import shutil
from pathlib import Path

import pytest
from refusals import refusal, refusal_of_command

import compress

QUICK = ("--prompts", "self", "--samples", "1", "--length", "8")
GRAPH_DATA, SHARD = "onnx/model.onnx.data", "checkpoint/model-00003-of-00010.safetensors"


@pytest.fixture
def out(applied, tmp_path) -> Path:
    """A copy of a finished output to damage."""
    return Path(shutil.copytree(applied, tmp_path / "out"))


def flip_bit(path: Path) -> None:
    """In the last byte: headers stay readable, the size stays the same."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b" ")


READERS = {
    "run": lambda cli, tiny, path: cli("run", path, "Once", "--max-tokens", 1),
    "inspect": lambda cli, tiny, path: cli("inspect", path),
    "verify": lambda cli, tiny, path: cli("inspect", path, "--verify"),
    "check": lambda cli, tiny, path: cli("check", tiny, path, *QUICK),
    "baseline": lambda cli, tiny, path: cli("check", path, tiny, *QUICK),
}
DIGESTS = ("verify", "check", "baseline")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", [truncate, append, Path.unlink], ids=["truncated", "longer", "missing"])
@pytest.mark.parametrize(
    ("part", "file"), [("", GRAPH_DATA), ("onnx", "onnx/tokenizer.json"), ("checkpoint", SHARD)], ids=str
)
def test_what_is_missing_or_has_another_size_is_refused_by_every_reader(
    compress_cli, tiny, out, reader, damage, part, file
):
    damage(out / file)
    said = refusal_of_command(READERS[reader](compress_cli, tiny, out / part))
    assert f"{out / file}: " in said


@pytest.mark.parametrize("reader", DIGESTS)
@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("", GRAPH_DATA),
        ("onnx", GRAPH_DATA),
        ("onnx/model.onnx", GRAPH_DATA),
        ("onnx", "onnx/genai_config.json"),
        ("checkpoint", SHARD),
        ("checkpoint", "checkpoint/tokenizer_config.json"),
    ],
    ids=str,
)
def test_a_flipped_bit_is_refused_where_digests_are_read(compress_cli, tiny, out, reader, part, file):
    flip_bit(out / file)
    said = refusal_of_command(READERS[reader](compress_cli, tiny, out / part))
    assert f"{out / file}: " in said
    assert "digest" in said


def test_only_the_digests_of_what_is_named_are_read(compress_cli, out):
    """The other parts of the output may be damaged: nobody asked for them."""
    flip_bit(out / SHARD)
    assert compress_cli("inspect", out / "onnx", "--verify").exit_code == 0
    assert SHARD in refusal_of_command(compress_cli("inspect", out, "--verify"))


def test_a_damaged_report_is_noticed_where_everything_is_verified(compress_cli, out):
    append(out / "report.json")
    assert "report.json" in refusal_of_command(compress_cli("inspect", out, "--verify"))


def test_inspect_says_how_much_it_verified(compress_cli, out):
    listed = json.loads((out / "manifest.json").read_text())["files"]
    facts = json.loads(compress_cli("inspect", out, "--verify", "--json").stdout)
    assert facts["verified"] == {"files": len(listed), "bytes": sum(entry["bytes"] for entry in listed.values())}
    assert f"{len(listed)} files" in compress_cli("inspect", out, "--verify").stdout
    assert "verified" not in json.loads(compress_cli("inspect", out, "--json").stdout)


def test_export_and_load_refuse_a_truncated_shard(compress_cli, out, tmp_path):
    truncate(out / "checkpoint" / "tokenizer_config.json")
    arguments = ("export", out / "checkpoint", "--to", "onnx", "-o", tmp_path / "exported")
    assert "tokenizer_config.json" in refusal_of_command(compress_cli(*arguments))
    assert not (tmp_path / "exported").exists()
    assert "tokenizer_config.json" in refusal(lambda: compress.load(out))


def test_apply_to_a_damaged_output_refuses_it(compress_cli, out, tmp_path):
    truncate(out / "checkpoint" / "generation_config.json")
    result = compress_cli("apply", "tiny-int8", "-m", out / "checkpoint", "-o", tmp_path / "second")
    assert "generation_config.json" in refusal_of_command(result)


def test_a_part_that_is_gone_is_not_replaced_by_another(compress_cli, out):
    """Else a check of the output would pass on the checkpoint though the graph that ships is missing."""
    shutil.rmtree(out / "onnx")
    assert str(out / "onnx") in refusal_of_command(compress_cli("inspect", out))
    assert compress_cli("inspect", out / "checkpoint").exit_code == 0


@pytest.mark.parametrize("part", ["checkpoint", "onnx"])
def test_a_part_that_was_moved_away_works_unverified(compress_cli, tiny, out, tmp_path, part):
    moved = Path(shutil.move(out / part, tmp_path / "moved"))
    append(moved / "tokenizer_config.json")
    assert compress_cli("check", tiny, moved, *QUICK).exit_code == 0
    assert "--verify" in refusal_of_command(compress_cli("inspect", moved, "--verify"))


@pytest.mark.parametrize("link", ["checkpoint", "onnx", "onnx/model.onnx"])
def test_a_link_to_a_part_is_verified_with_the_manifest_of_its_target(compress_cli, out, tmp_path, link):
    name = "model.onnx" if link.endswith(".onnx") else "link"
    (tmp_path / name).symlink_to(out / link)
    folder = out / link.split("/")[0]
    flip_bit(folder / "tokenizer_config.json")
    assert "tokenizer_config.json" in refusal_of_command(compress_cli("inspect", tmp_path / name, "--verify"))


def test_paths_are_found_from_within_the_output(compress_cli, out, monkeypatch):
    monkeypatch.chdir(out / "onnx")
    flip_bit(out / GRAPH_DATA)
    for path in (".", "model.onnx", "../onnx", ".."):
        assert "model.onnx.data" in refusal_of_command(compress_cli("inspect", path, "--verify"))


def test_a_file_that_is_a_link_into_a_store_is_read_through_it(compress_cli, out, tmp_path):
    shutil.move(out / GRAPH_DATA, tmp_path / "blob")
    (out / GRAPH_DATA).symlink_to(tmp_path / "blob")
    assert compress_cli("inspect", out, "--verify").exit_code == 0
    flip_bit(tmp_path / "blob")
    assert "model.onnx.data" in refusal_of_command(compress_cli("inspect", out, "--verify"))


@pytest.mark.parametrize("beside", ["in", "above"])
@pytest.mark.parametrize("text", ['{"name": "an app", "files": ["a.js"]}', "[]", "not JSON", ""])
def test_a_manifest_of_another_tool_is_left_alone(compress_cli, tiny, tmp_path, beside, text):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    ((model if beside == "in" else tmp_path) / "manifest.json").write_text(text)
    assert compress_cli("inspect", model).exit_code == 0
    assert "nothing to compare" in refusal_of_command(compress_cli("inspect", model, "--verify"))


def edited(change):
    def edit(manifest: Path) -> None:
        values = json.loads(manifest.read_text())
        change(values)
        manifest.write_text(json.dumps(values))

    return edit


DAMAGED = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_text(""),
    "garbage": lambda path: path.write_bytes(b"\xff\x00garbage"),
    "a list": lambda path: path.write_text("[]"),
    "no files": edited(lambda values: values.pop("files")),
    "files are a list": edited(lambda values: values.update(files=["onnx/model.onnx"])),
    "no digest": edited(lambda values: values["files"][GRAPH_DATA].pop("sha256")),
    "digest is a number": edited(lambda values: values["files"][GRAPH_DATA].update(sha256=3)),
    "size is text": edited(lambda values: values["files"][GRAPH_DATA].update(bytes="12")),
    "size is negative": edited(lambda values: values["files"][GRAPH_DATA].update(bytes=-1)),
    "above": edited(lambda values: values["files"].update({"onnx/../../secret": values["files"][GRAPH_DATA]})),
    "absolute": edited(lambda values: values["files"].update({"/etc/passwd": values["files"][GRAPH_DATA]})),
}


@pytest.mark.parametrize("part", ["", "onnx", "checkpoint"])
@pytest.mark.parametrize("damage", DAMAGED.values(), ids=list(DAMAGED))
def test_a_damaged_manifest_is_named(compress_cli, out, damage, part):
    damage(out / "manifest.json")
    assert "manifest.json" in refusal_of_command(compress_cli("inspect", out / part))


def test_files_that_the_manifest_does_not_list_are_the_users_own(compress_cli, out):
    (out / "onnx" / "notes.txt").write_text("mine")
    (out / "extra").mkdir()
    assert compress_cli("inspect", out, "--verify").exit_code == 0


@pytest.mark.parametrize("model", ["tiny", "nobody/nothing"])
def test_verify_without_a_manifest_says_that_there_is_nothing_to_compare_with(compress_cli, tiny, model):
    said = refusal_of_command(compress_cli("inspect", tiny if model == "tiny" else model, "--verify"))
    assert "nothing to compare" in said
