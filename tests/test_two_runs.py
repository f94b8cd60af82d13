"""Two runs at once: one writes, the other is told so; what a dead one left is found and goes in time."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interruptions import stop_after
from refusals import refusal, refusal_of_command

import cli
from compress.apply import exporting, pipeline, sweep
from compress.disk import cache, locks, partials
from compress.disk.locks import LOCK
from exporters.graph.builder import WeightFile

HELD = "is being written by another process"
AGAIN = ((), ("--resume",), ("--overwrite",), ("--resume", "--overwrite"))
DAY = 24 * 60 * 60


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def partial(out) -> Path:
    return out.with_name("out.partial")


@pytest.fixture
def apply(compress_cli, small, out):
    def run(*arguments, to=out):
        return compress_cli(
            "apply", "tiny-int8", "-m", small, "-o", to, "--set", "check=null", "--set", "export=[]", *arguments
        )

    return run


@pytest.fixture
def stopped(apply, partial, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 3)
        assert apply().exit_code == 130
    return partial


def contents(folder: Path) -> dict[str, tuple]:
    """Every path below a folder with what tells whether it was touched."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def age(path: Path, seconds: float) -> None:
    for changed in (path, *path.rglob("*")):
        os.utime(changed, (time.time() - seconds,) * 2)


# ---- the work folder


@pytest.mark.parametrize("again", AGAIN, ids=" ".join)
def test_a_second_run_is_told_that_another_process_writes_and_touches_nothing(apply, stopped, tmp_path, again):
    held, before = locks.hold(stopped / LOCK), contents(tmp_path)
    assert HELD in refusal_of_command(apply(*again))
    assert contents(tmp_path) == before
    held.release()
    if not again:
        said = refusal_of_command(apply())
        assert "--resume" in said and "--overwrite" in said and HELD not in said
    assert apply(*(again or ("--resume",))).exit_code == 0


@pytest.mark.parametrize("again", AGAIN, ids=" ".join)
def test_a_held_work_folder_counts_before_a_complete_output(apply, out, partial, again):
    assert apply().exit_code == 0
    partial.mkdir()
    held = locks.hold(partial / LOCK)
    assert HELD in refusal_of_command(apply(*again))
    held.release()
    assert (out / "manifest.json").is_file()


WAITING = """
import sys
import cli
from compress.apply import pipeline, sweep

def wait(owner, name):
    real = getattr(owner, name)
    def waiting(*arguments, **options):
        print("here", flush=True)
        sys.stdin.readline()
        return real(*arguments, **options)
    setattr(owner, name, waiting)

wait({owner}, "{name}")
cli.main(sys.argv[1:])
"""


def start(code: str, *arguments) -> subprocess.Popen:
    """A process of its own that has come to its first `here`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n", process.communicate()[1]
    return process


@pytest.mark.parametrize(("owner", "name"), [("pipeline", "prepare"), ("sweep", "run")])
def test_a_run_in_another_process_is_alone_from_before_it_plans_until_it_publishes(
    apply, small, out, partial, tmp_path, owner, name
):
    recipe = ("tiny-int8", "-m", small, "-o", out, "--set", "check=null", "--set", "export=[]")
    process = start(WAITING.format(owner=owner, name=name), "apply", *recipe)
    for again in AGAIN:
        assert HELD in refusal_of_command(apply(*again))
    _, said = process.communicate("\n")
    assert process.returncode == 0, said
    assert not partial.exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert not any(LOCK in name or "journal" in name for name in manifest["files"])
    assert not (out / LOCK).exists()
    alone = tmp_path / "alone"
    assert apply(to=alone).exit_code == 0
    assert digests_of_shards(alone) == digests_of_shards(out)
    assert "complete" in refusal_of_command(apply())


def digests_of_shards(out: Path) -> dict[str, str]:
    files = json.loads((out / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}


def test_what_a_killed_run_held_is_free(apply, small, out, stopped):
    recipe = ("tiny-int8", "-m", small, "-o", out, "--set", "check=null", "--set", "export=[]", "--resume")
    process = start(WAITING.format(owner="pipeline", name="prepare"), "apply", *recipe)
    assert HELD in refusal_of_command(apply("--resume"))
    process.kill()
    process.communicate()
    assert apply("--resume").exit_code == 0


def test_an_input_that_planning_refuses_leaves_nothing(compress_cli, small, tmp_path):
    to = tmp_path / "new" / "deeper" / "out"
    arguments = ("apply", "tiny-int8", "-m", small, "-o", to, "--set", "check.prompts=[heldout]")
    assert "tokenizer" in refusal_of_command(compress_cli(*arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("again", [("--overwrite",), ("--resume",)])
def test_an_input_that_planning_refuses_leaves_an_earlier_run_as_it_was(apply, stopped, tmp_path, again):
    before = contents(tmp_path)
    refusal_of_command(apply(*again, "--set", "check={prompts: [heldout]}"))
    assert contents(tmp_path) == before
    assert apply("--resume").exit_code == 0


def test_an_interruption_while_planning_leaves_nothing(apply, monkeypatch, tmp_path):
    stop_after(monkeypatch, pipeline, "prepare", 0)
    assert apply().exit_code == 130
    assert not list(tmp_path.iterdir())


def test_an_earlier_run_of_a_version_without_locks_gets_none_left_in_it(apply, stopped, tmp_path):
    (stopped / LOCK).unlink()
    before = contents(tmp_path)
    refusal_of_command(apply())
    refusal_of_command(apply("--resume", "--seed", 5))
    assert contents(tmp_path).keys() == before.keys()


def test_what_was_killed_while_planning_can_be_resumed(apply, partial):
    partial.mkdir()
    (partial / LOCK).touch()
    assert "--resume" in refusal_of_command(apply())
    assert apply("--resume").exit_code == 0


def test_an_output_that_appears_while_a_run_works_is_not_replaced_unasked(apply, out, tmp_path, monkeypatch):
    assert apply(to=tmp_path / "other").exit_code == 0
    real = sweep.run
    monkeypatch.setattr(
        sweep,
        "run",
        lambda *arguments: (out.exists() or shutil.copytree(tmp_path / "other", out)) and real(*arguments),
    )
    (tmp_path / "other" / "mark").touch()
    assert "complete" in refusal_of_command(apply())
    assert (out / "mark").is_file()
    assert apply("--resume", "--overwrite").exit_code == 0
    assert not (out / "mark").exists()


def test_an_output_that_is_published_between_a_glance_and_the_lock_is_not_replaced(apply, out, monkeypatch, tmp_path):
    """The first look finds nothing, the second one, under the lock, a complete output."""
    assert apply(to=tmp_path / "other").exit_code == 0
    real = partials.make

    def publish_first(target):
        if not out.exists():
            shutil.copytree(tmp_path / "other", out)
        return real(target)

    monkeypatch.setattr(partials, "make", publish_first)
    monkeypatch.setattr(pipeline, "prepare", None)  # planning would call it
    refusal_of_command(apply())
    assert not out.with_name("out.partial").exists()


def test_a_lock_on_a_file_that_got_another_name_is_taken_anew(tmp_path, monkeypatch):
    path, real = tmp_path / LOCK, fcntl.flock

    def publishes_first(descriptor, kind):
        if not (tmp_path / "published").exists():
            os.replace(path, tmp_path / "published")
        return real(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", publishes_first)
    held = locks.hold(path)
    assert os.path.samestat(os.fstat(held.descriptor), path.stat())
    assert locks.is_held(path) and not locks.is_held(tmp_path / "published")


def stop_a_replacement(apply, monkeypatch) -> None:
    """An output of seed 1, and the work folder of an interrupted run of seed 0 that was to replace it."""
    assert apply("--seed", 1).exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 3)
        assert apply("--overwrite").exit_code == 130


def test_a_killed_replacement_gives_the_earlier_output_back(apply, out, partial, monkeypatch):
    """Killed between the two renames: the earlier output is in the work folder."""
    stop_a_replacement(apply, monkeypatch)
    os.replace(out, partial / ".previous")
    assert "complete" in refusal_of_command(apply("--resume"))
    assert json.loads((out / "manifest.json").read_text())["seed"] == 1
    assert apply("--resume", "--overwrite").exit_code == 0
    assert json.loads((out / "manifest.json").read_text())["seed"] == 0
    assert not (out / ".previous").exists()


def test_an_output_whose_place_another_took_meanwhile_is_no_part_of_what_is_published(apply, out, partial, monkeypatch):
    stop_a_replacement(apply, monkeypatch)
    shutil.copytree(out, partial / ".previous")
    assert apply("--resume", "--overwrite").exit_code == 0
    files = json.loads((out / "manifest.json").read_text())["files"]
    assert "checkpoint/config.json" in files and not [name for name in files if not (out / name).is_file()]


def no_locks(*arguments):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_is_usable_and_the_run_says_so(apply, out, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 3)
        assert apply().exit_code == 130
    result = apply("--resume")
    assert result.exit_code == 0
    assert "no locks" in result.stderr
    assert (out / "manifest.json").is_file()


# ---- exports


def test_of_two_exports_to_one_place_the_later_is_refused_and_changes_nothing(small, tmp_path, monkeypatch):
    to, real = tmp_path / "onnx", exporting._fill_export

    def overtaken(*arguments):
        monkeypatch.setattr(exporting, "_fill_export", real)
        with pytest.raises(Exception, match=HELD):  # seen before the work
            exporting.export_checkpoint(small, "onnx", to)
        to.mkdir()
        (to / "mark").touch()
        return real(*arguments)

    monkeypatch.setattr(exporting, "_fill_export", overtaken)
    assert "meanwhile" in refusal(lambda: exporting.export_checkpoint(small, "onnx", to))
    assert [path.name for path in to.iterdir()] == ["mark"]
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_an_export_leaves_nothing_but_itself(small, tmp_path):
    exporting.export_checkpoint(small, "onnx", tmp_path / "onnx")
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
    assert LOCK not in {path.name for path in (tmp_path / "onnx").iterdir()}


LEFT = {
    "an export of an earlier version": ("onnx.ab12cd_f.partial", ("model.onnx.data",), True),
    "an export": ("onnx.ab12cd34.partial", (LOCK, "export/model.onnx.data"), True),
    "nothing yet": ("onnx.ab12cd34.partial", (), True),
    "a run to resume": ("onnx.20251125.partial", (LOCK, "journal.json"), False),
    "somebody's": ("onnx.mine.partial", ("thesis.txt",), False),
    "another export": ("other.ab12cd34.partial", ("model.onnx.data",), False),
}


@pytest.mark.parametrize(("name", "inside", "goes"), LEFT.values(), ids=list(LEFT))
def test_what_a_killed_export_left_goes_a_day_later_and_nothing_else(small, tmp_path, name, inside, goes):
    left = tmp_path / name
    for file in inside or ("",):
        (left / file).parent.mkdir(parents=True, exist_ok=True)
        (left / file).touch() if file else left.mkdir(exist_ok=True)
    for seconds, stays in ((DAY - 600, True), (DAY + 600, not goes)):
        age(left, seconds)
        shutil.rmtree(tmp_path / "onnx", ignore_errors=True)
        exporting.export_checkpoint(small, "onnx", tmp_path / "onnx")
        assert left.exists() == stays


def test_a_killed_export_inside_a_run_goes_at_once(compress_cli, small, out, partial, monkeypatch):
    arguments = ("apply", "tiny-int8", "-m", small, "-o", out, "--set", "check=null")
    with monkeypatch.context() as patch:
        stop_after(patch, WeightFile, "add", 20)
        assert compress_cli(*arguments).exit_code == 130
    (partial / "onnx.ab12cd34.partial").mkdir()
    (partial / "onnx.ab12cd34.partial" / "model.onnx.data").touch()
    assert compress_cli(*arguments, "--resume").exit_code == 0
    assert not list(out.rglob("*.partial"))


# ---- the shared cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["candidate.1.partial", "x.f32.4194304.partial", "candidate.0a1b2c3d.partial"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_what_killed_processes_left_in_the_cache_goes_when_it_is_a_day_old_and_unlocked(own_cache, name, is_folder):
    left = cache.folder("scratch") / name
    left.mkdir() if is_folder else left.touch()
    lock = left / LOCK if is_folder else left

    def stays(seconds: float) -> bool:
        age(left, seconds)
        with cache.scratch("another"):
            pass
        return left.exists()

    held = locks.hold(lock)
    assert stays(30 * DAY), "its lock is held"
    held.release()
    assert stays(DAY - 600), "another machine may be at work there"
    if is_folder:
        (left / "fresh").touch()
        os.utime(left, (0, 0))
        with cache.scratch("another"):
            assert left.exists(), "something in it changed"
    assert not stays(DAY + 600)


SCRATCH = """
import sys
from compress.disk import cache
with cache.scratch("candidate") as folder:
    (folder / "states").touch()
    print("here", flush=True)
    sys.stdin.readline()
    assert (folder / "states").exists()
"""


def test_scratch_of_a_living_process_stays_however_old_and_that_of_a_killed_one_goes(own_cache):
    living, killed = start(SCRATCH), start(SCRATCH)
    age(own_cache / "scratch", 30 * DAY)
    killed.kill()
    killed.communicate()
    with cache.scratch("candidate"):
        assert len(list((own_cache / "scratch").iterdir())) == 2
    _, said = living.communicate("\n")
    assert living.returncode == 0, said
    assert not list((own_cache / "scratch").iterdir())


def test_where_locks_are_unknown_leftovers_stay(own_cache, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    left = cache.folder("scratch") / "x.partial"
    left.touch()
    age(left, 30 * DAY)
    with cache.scratch("another"):
        pass
    assert left.exists()


def test_nothing_is_named_after_a_process(own_cache, apply, partial, monkeypatch, small):
    """Two containers are both process 1."""
    with cache.scratch("a") as first, cache.scratch("a") as second:
        assert first != second
    with cache.publish(cache.folder("b") / "b") as first:
        first.touch()
        with cache.publish(cache.folder("b") / "b") as second:
            second.touch()
    assert first != second
