"""Where people put things: what cannot become an output folder, or a cache, is refused before the work."""

import builtins
import errno
import os
import pwd
import re
import shutil
import stat
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from refusals import refusal_of_command

from compress.apply import pipeline
from compress.check import baseline
from compress.output_folder import destination
from compress.runtime.inference import HiddenStates
from exporters.graph.builder import WeightFile

OWN_TEXT = ("--set", "check={prompts: [self], samples: 1, length: 4}")


@pytest.fixture
def apply(compress_cli, small):
    def run(*arguments, to, check=("--set", "check=null")):
        return compress_cli("apply", "tiny-int8", "-m", small, "-o", to, *check, "--set", "export=[]", *arguments)

    return run


@pytest.fixture
def no_work(monkeypatch):
    """Whoever begins to plan fails."""
    monkeypatch.setattr(pipeline, "prepare", None)


# ---- the output folder


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)], ids=" ".join)
def test_an_empty_folder_is_replaced_and_keeps_its_permissions(apply, tmp_path, flags):
    (tmp_path / "out").mkdir(mode=0o700)
    assert apply(*flags, to=tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("target", ["there", "not/there"])
def test_of_a_symbolic_link_the_target_is_used_and_the_link_stays(apply, tmp_path, target):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    for flags in ((), ("--overwrite",)):
        assert apply(*flags, to=link).exit_code == 0
        assert link.is_symlink()
        assert (tmp_path / target / "manifest.json").is_file()
    assert "complete" in refusal_of_command(apply(to=link))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_work_folder_beside_the_target_of_a_link_is_the_links(apply, tmp_path):
    (tmp_path / "disk" / "out.partial").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    assert "earlier run" in refusal_of_command(apply(to=tmp_path / "link"))


def in_the_way(folder: Path, name: str) -> None:
    if name == "a file":
        (folder / "out.partial").touch()
    elif name == "a dangling link":
        (folder / "out.partial").symlink_to("nowhere")
    else:
        (folder / "elsewhere").mkdir()
        (folder / "out.partial").symlink_to("elsewhere")


@pytest.mark.parametrize("name", ["a file", "a dangling link", "a link to a folder"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)], ids=" ".join)
def test_a_work_folder_that_is_no_folder_is_refused_and_left_alone(apply, no_work, tmp_path, name, flags):
    in_the_way(tmp_path, name)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert "out.partial" in refusal_of_command(apply(*flags, to=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


PLACES = (
    ".",
    "/",
    "..",
    "inside/..",
    "x" * 300,
    "x" * 250,
    "deep/" + "x" * 250,
    "file/out",
    "loop",
    "y/" * 2100 + "out",
)


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=" ".join)
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:12])
def test_a_place_that_cannot_be_is_refused_before_the_work(apply, no_work, tmp_path, monkeypatch, place, flags):
    (tmp_path / "here" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("file").touch()
    Path("loop").symlink_to("loop")
    refusal_of_command(apply(*flags, to=place))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "here", "inside", "loop"]


@pytest.mark.parametrize("place", ["x" * 300, "/", "."])
def test_a_dry_run_refuses_such_a_place_too(apply, place):
    refusal_of_command(apply("--dry-run", to=place))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_work(apply, no_work, tmp_path, monkeypatch, code):
    """As mkdir says it: whoever may write everywhere, as in a container, cannot be told by permissions."""

    def refused(*arguments, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refused)
    to = tmp_path / "deep" / "out"
    said = refusal_of_command(apply(to=to))
    assert str(to) in said and os.strerror(code) in said


@pytest.mark.parametrize("mounted", ["out", "out.partial"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)], ids=" ".join)
def test_a_mount_point_is_refused_before_the_work(apply, no_work, tmp_path, monkeypatch, mounted, flags):
    (tmp_path / mounted).mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == mounted)
    said = refusal_of_command(apply(*flags, to=tmp_path / "out"))
    assert mounted in said
    assert mounted != "out" or f"-o {tmp_path / 'out' / 'out'}" in said


def test_mount_points_are_known_also_within_one_file_system(tmp_path, monkeypatch):
    """proc(5): blanks are written in octal, and the fifth field counts."""
    (tmp_path / "a b").mkdir()
    listing = f"36 35 98:0 /x {tmp_path!s}/a\\040b rw master:1 - ext3 /dev/root rw\n"
    monkeypatch.setattr(Path, "read_text", lambda path, **options: listing)
    assert destination.is_mount_point(tmp_path / "a b")
    assert not destination.is_mount_point(tmp_path)
    assert destination.is_mount_point(Path("/proc"))


@pytest.mark.parametrize("place", [".", "/", "x" * 300, "file/out"])
def test_an_export_refuses_such_places_too(compress_cli, small, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    refusal_of_command(compress_cli("export", small, "--to", "onnx", "-o", place))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_export_to_a_link_goes_to_its_target(compress_cli, small, tmp_path):
    (tmp_path / "link").symlink_to("target")
    assert compress_cli("export", small, "--to", "onnx", "-o", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "model.onnx").is_file()


# ---- the cache


def check(compress_cli, model: Path, *arguments):
    return compress_cli("check", model, model, "--prompts", "self", "--samples", "1", "--length", "4", *arguments)


@pytest.fixture(params=["a file", "read-only"])
def unusable_cache(request, tmp_path, monkeypatch) -> Path:
    """A cache that nothing can be written to, the second as the kernel says it."""
    place = tmp_path / "cache"
    monkeypatch.setenv("COMPRESS_CACHE", str(place))
    if request.param == "a file":
        place.touch()
        return place
    place.mkdir()
    real = os.open

    def read_only(path, flags, *arguments, **options):
        if str(path).startswith(str(place)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    return place


def test_a_check_names_the_cache_it_cannot_write_to(compress_cli, small, unusable_cache):
    said = refusal_of_command(check(compress_cli, small))
    assert str(unusable_cache) in said and "COMPRESS_CACHE" in said


def test_a_run_that_ends_in_a_check_says_so_before_the_work(apply, unusable_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_run", None)
    said = refusal_of_command(apply(to=tmp_path / "out", check=OWN_TEXT))
    assert "COMPRESS_CACHE" in said
    assert not list(tmp_path.glob("out*"))


def test_a_user_without_a_home_is_told_of_the_variable(compress_cli, apply, small, tmp_path, monkeypatch):
    for name in ("HOME", "COMPRESS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert "COMPRESS_CACHE" in refusal_of_command(check(compress_cli, small))
    assert "COMPRESS_CACHE" in refusal_of_command(apply(to=tmp_path / "out", check=OWN_TEXT))
    assert "COMPRESS_CACHE" in refusal_of_command(apply("--dry-run", to=tmp_path / "out", check=OWN_TEXT))
    assert apply(to=tmp_path / "out").exit_code == 0, "nothing is cached without a check"


def with_free(monkeypatch, free: int) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free))


def test_a_check_says_before_the_work_that_its_cache_will_not_fit(compress_cli, small, tmp_path, monkeypatch):
    """67 tokens: 3 positions take 804 bytes, 4 hidden states of 40 another 640."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    with_free(monkeypatch, 804 + 640 - 1)
    with monkeypatch.context() as patch:
        patch.setattr(baseline, "compute", None)
        assert "MiB" in refusal_of_command(check(compress_cli, small))
    with_free(monkeypatch, 804 + 640)
    assert check(compress_cli, small).exit_code == 0
    with_free(monkeypatch, 640)
    assert check(compress_cli, small).exit_code == 0, "the baseline is there already"


def test_text_that_would_not_fit_is_not_written_first(compress_cli, small, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    with_free(monkeypatch, 1000)
    monkeypatch.setattr("compress.prompts.self_text._batch", None)
    assert "MiB" in refusal_of_command(check(compress_cli, small, "--length", "50"))


# ---- disks that fill up


class Full:
    """An open file that takes nothing more."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(monkeypatch, ending: str) -> None:
    """From now on files with such a name cannot be written."""
    real = builtins.open

    def opened(path, mode="r", *arguments, **options):
        file = real(path, mode, *arguments, **options)
        return Full(file) if "w" in mode and re.search(f"{ending}$", str(path)) else file

    monkeypatch.setattr(builtins, "open", opened)


FILES = {
    "a shard": ("00003-of-00008.tmp", "checkpoint"),
    "json": ("config.json.tmp", "checkpoint/config.json"),
    "the journal": ("journal.json.tmp", "journal.json"),
    "weights of an export": ("model.onnx.data", "onnx"),
    "the baseline": ("[0-9a-f]{32}.f32", "cache/baseline"),
    "own text": (".npy", "cache/self-text"),
    "states of the check": ("hidden-00000.f32", "hidden-00000.f32"),
}


@pytest.mark.parametrize(("ending", "named"), FILES.values(), ids=list(FILES))
def test_a_full_disk_is_told_with_path_and_cause_wherever_it_happens(
    compress_cli, small, tmp_path, monkeypatch, ending, named
):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", *OWN_TEXT)
    with monkeypatch.context() as patch:
        fill(patch, ending)
        said = refusal_of_command(compress_cli(*arguments), code=3)
    assert "No space left on device" in said and named in said and str(tmp_path) in said
    assert not (tmp_path / "out").exists()
    assert compress_cli(*arguments, "--resume").exit_code == 0


def test_hidden_states_and_exported_weights_say_why_they_cannot_be_written(tmp_path, monkeypatch):
    """numpy writes to files behind Python's back: its errors have neither a cause nor a path."""
    fill(monkeypatch, "hidden-00000.f32")
    states = HiddenStates(tmp_path, [torch.zeros(3)], 2)
    with pytest.raises(OSError, match="No space left") as caught:
        states.write(0, torch.zeros(1, 3, 2))
    assert caught.value.filename == str(tmp_path / "hidden-00000.f32")
    fill(monkeypatch, "model.onnx.data")
    with pytest.raises(OSError, match="No space left"):
        WeightFile(tmp_path / "model.onnx.data").add("x", torch.zeros(3), ir.DataType.FLOAT, (3,))


def test_the_longest_name_a_work_folder_can_have_is_used(apply, tmp_path):
    """255 bytes are a name's limit; while it is made, the work folder's is 17 longer than the output's."""
    assert apply(to=tmp_path / ("x" * 238)).exit_code == 0
    assert len(refusal_of_command(apply(to=tmp_path / ("x" * 239)))) > 239


def test_a_folder_of_another_tool_with_a_manifest_of_its_own_is_never_replaced(apply, tmp_path):
    extension = tmp_path / "extension"
    extension.mkdir()
    (extension / "manifest.json").write_text('{"manifest_version": 3, "name": "theirs", "files": []}')
    for flags in ((), ("--overwrite",), ("--resume", "--overwrite")):
        assert "not an output of this tool" in refusal_of_command(apply(*flags, to=extension))
    assert [path.name for path in tmp_path.iterdir()] == ["extension"] and "theirs" in (
        extension / "manifest.json"
    ).read_text()


def test_a_damaged_output_of_this_tool_is_replaced(apply, tmp_path):
    out = tmp_path / "out"
    assert apply(to=out).exit_code == 0
    (out / "manifest.json").write_text("{")
    assert apply("--overwrite", to=out).exit_code == 0


LONG = "a" * 300
NAMED = {
    "an artifact": ("inspect", LONG),
    "a prompt in an artifact's place": ("run", LONG, "hi"),
    "a baseline": ("check", LONG, LONG),
    "a result": ("check", ".", ".", "--json", LONG),
    "a checkpoint": ("export", LONG),
}


@pytest.mark.parametrize("arguments", NAMED.values(), ids=list(NAMED))
def test_a_name_that_no_file_can_have_is_bad_input(compress_cli, arguments):
    assert "File name too long" in refusal_of_command(compress_cli(*arguments))
