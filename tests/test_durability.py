"""After a loss of power: what has its final name, or is noted as done, is on disk. The order of fsync and rename tells."""

import os
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import yaml

from compress.apply import exporting, pipeline
from compress.disk import cache, json_files
from compress.output_folder.workspace import Workspace
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from exporters.graph.builder import WeightFile


class Disk:
    """What has reached it: contents by inode, time and size of the last change; names by folder."""

    def __init__(self, patch):
        self.contents, self.unsaved, self.renames, self.notes = set(), {}, [], []
        self._fsync, self._replace, self._mark_done = os.fsync, os.replace, Workspace.mark_done
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)
        patch.setattr(Workspace, "mark_done", lambda space, piece: self.mark_done(space, piece))

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        stat = os.fstat(descriptor)
        self.contents.add((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        self.unsaved.pop(stat.st_ino, None)

    def replace(self, source, target) -> None:
        self.refuse_unwritten(Path(source))
        self._replace(source, target)
        self.unsaved[Path(target).parent.stat().st_ino] = str(target)
        self.renames.append(Path(target).name)

    def mark_done(self, space, piece: str) -> None:
        """What the journal is about to say must be true of the disk: bytes, and names."""
        self.refuse_unwritten(space.folder / piece)
        folders = {path.stat().st_ino for path in (space.folder / piece, (space.folder / piece).parent)}
        assert not folders & self.unsaved.keys(), piece
        self.notes.append(piece)
        self._mark_done(space, piece)

    def refuse_unwritten(self, path: Path) -> None:
        """Bytes of files and names in folders; a lock, and a folder with nothing else, may be lost."""
        for found in (path, *path.rglob("*")):
            if found.name != ".lock" and not (found.is_dir() and list(found.iterdir()) == [found / ".lock"]):
                stat = found.stat()
                assert (stat.st_ino, stat.st_mtime_ns, stat.st_size) in self.contents, f"{found} is not on disk"


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def applied(folder: Path, model: Path, recipe: dict) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"version": 1, **recipe}))
    out = folder / "out"
    pipeline.apply(pipeline.Job(load_recipe(str(folder / "recipe.yaml")), resolve(str(model)), out, overwrite=True))
    return out


def test_a_run_names_and_notes_only_what_is_on_disk(disk, small, tmp_path):
    (tmp_path / "out").mkdir()
    recipe = {"passes": [{"quantize": {"weights": "int8"}}], "export": [{"onnx": {}}]}
    out = applied(tmp_path, small, recipe)
    applied(tmp_path, small, recipe)  # replaces the first
    assert not disk.unsaved, "names that a loss of power would take back"
    files = {path.name for path in out.rglob("*") if path.is_file()}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "generation_config.json"} <= files
    assert {"onnx", "out", "manifest.json", "journal.json"} <= set(disk.renames)
    assert "onnx" in disk.notes


def test_a_calibrated_run_notes_only_what_is_on_disk(disk, small, tmp_path):
    recipe = {
        "passes": [{"quantize": {"method": "gptq", "weights": "int8"}}],
        "calibration": {"prompts": ["self"], "samples": 2, "length": 12},
    }
    applied(tmp_path, small, recipe)
    assert not disk.unsaved
    kinds = {note.split("-")[0].split(".")[0] for note in disk.notes}
    assert kinds == {"checkpoint/model", "calibration/states", "calibration/note"}


def test_an_export_gets_its_name_when_it_is_on_disk(disk, small, tmp_path):
    exporting.export_checkpoint(small, "onnx", tmp_path / "onnx")
    assert disk.renames[-1] == "onnx" and not disk.unsaved


def test_a_cache_entry_gets_its_name_when_it_is_on_disk(disk):
    cache.entry(cache.folder("things") / "x", lambda file: file.write(b"x" * 100_000))
    assert disk.renames == ["x"] and not disk.unsaved


def test_weights_of_an_export_are_on_disk_when_their_file_is_closed(disk, tmp_path):
    weights = WeightFile(tmp_path / "model.onnx.data")
    weights.add("x", torch.ones(1000), ir.DataType.FLOAT, (1000,))
    weights.close()
    disk.refuse_unwritten(tmp_path / "model.onnx.data")


def test_a_file_of_text_gets_its_name_when_it_is_on_disk(disk, tmp_path):
    json_files.write_json(tmp_path / "a.json", {"a": 1})
    assert disk.renames == ["a.json"] and not disk.unsaved


def test_the_manifest_is_written_when_everything_else_is_on_disk(disk, small, tmp_path, monkeypatch):
    real = pipeline.manifest.build
    monkeypatch.setattr(
        pipeline.manifest, "build", lambda folder, *rest: disk.refuse_unwritten(folder) or real(folder, *rest)
    )
    applied(tmp_path, small, {"passes": [{"quantize": {"weights": "int8"}}]})
