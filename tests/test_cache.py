"""The cache: what does not agree with its digest is made again, what is open stays readable, a full disk is named."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.check import baseline
from compress.checkpoint.reader import Checkpoint
from compress.disk import cache
from compress.prompts import PromptSet, self_text
from compress.runtime.artifacts import CheckpointArtifact
from compress.runtime.candidates import CheckpointCandidate

DAMAGE = {
    "cut short": lambda data: data[: len(data) // 2],
    "without its last byte": lambda data: data[:-1],
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "zeros at its end, as after a loss of power": lambda data: data[:-100] + bytes(100),
    "NaN": lambda data: np.full(len(data) // 4, np.nan, np.float32).tobytes(),
    "garbage": lambda data: b"garbage" * (len(data) // 7),
    "one bit": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
    "longer": lambda data: data + b"\0",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "BLOCK_BYTES", 256)  # entries of several blocks
    return tmp_path / "cache"


@pytest.fixture
def baselines(small, monkeypatch):
    """Log-probabilities of window 0 by seed; `.made` counts computations."""
    model, real = Checkpoint(small).model, baseline._write

    def get(seed: int = 0) -> torch.Tensor:
        windows = [torch.randint(67, (9,), generator=torch.Generator().manual_seed(seed))]
        return baseline.compute(CheckpointCandidate(model), "cached", PromptSet("random", windows)).log_probs(0, 0, 8)

    get.made = []
    monkeypatch.setattr(baseline, "_write", lambda *arguments: get.made.append(1) or real(*arguments))
    return get


@pytest.fixture
def own_texts(small, monkeypatch):
    artifact, real = CheckpointArtifact(Checkpoint(small)), self_text._batch

    def get(seed: int = 0) -> torch.Tensor:
        return torch.stack(self_text.windows(artifact, "cached", 4, 30, seed))

    get.made = []
    monkeypatch.setattr(self_text, "_batch", lambda *arguments: get.made.append(1) or real(*arguments))
    return get


@pytest.fixture(params=["baselines", "own_texts"])
def kept(request):
    """Something that is kept in the cache, made from a seed."""
    return request.getfixturevalue(request.param)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.*"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_a_damaged_entry_is_made_again(kept, own_cache, damage):
    first = kept()
    assert torch.equal(kept(), first) and len(kept.made) == 1
    (entry,) = entries(own_cache)
    entry.write_bytes(damage(entry.read_bytes()))
    assert torch.equal(kept(), first) and len(kept.made) == 2
    assert torch.equal(kept(), first) and len(kept.made) == 2, "and kept again"


def test_an_entry_of_another_run_is_not_taken_for_this_ones(kept, own_cache):
    first, other = kept(0), kept(1)
    mine, theirs = sorted(entries(own_cache))
    mine.write_bytes(theirs.read_bytes())
    theirs.unlink()
    assert torch.equal(kept(0), first) and torch.equal(kept(1), other)
    assert len(kept.made) == 4


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])  # opening a named pipe waits for whoever writes to it
def test_an_entry_that_cannot_be_a_file_is_made_again(kept, own_cache, make):
    first = kept()
    (entry,) = entries(own_cache)
    entry.unlink()
    make(entry)
    assert torch.equal(kept(), first) and entry.is_file()


def test_two_processes_may_make_the_same_entry_at_once(own_cache):
    path = cache.folder("things") / "x"

    def overtaken(file):
        cache.entry(path, lambda other: other.write(b"same")).close()
        file.write(b"same")

    assert cache.entry(path, overtaken).read(4) == b"same"
    assert cache.entry(path, None).read(4) == b"same"
    assert [entry.name for entry in path.parent.iterdir()] == ["x"]


def test_an_entry_that_is_read_stays_readable_when_another_process_removes_or_replaces_it(own_cache):
    path = cache.folder("things") / "x"
    made = cache.entry(path, lambda file: file.write(b"first"))
    read = cache.entry(path, None)
    path.unlink()
    cache.entry(path, lambda file: file.write(b"other"))
    assert made.read(5) == read.read(5) == b"first"


def test_an_entry_in_use_counts_as_new(own_cache):
    path = cache.folder("things") / "old"
    cache.entry(path, lambda file: file.write(b"x"))
    for number in range(cache.NEWEST_KEPT):
        os.utime(path, (0, 0))
        cache.entry(path, None)
        cache.entry(path.with_name(str(number)), lambda file: file.write(b"x"))
    assert path.exists()
    assert len(list(path.parent.iterdir())) == cache.NEWEST_KEPT


def test_an_entry_of_another_user_is_used_though_it_cannot_be_marked_as_used(own_cache, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    path = cache.folder("things") / "x"
    cache.entry(path, lambda file: file.write(b"theirs")).close()
    monkeypatch.setattr(os, "utime", refused)
    assert cache.entry(path, None).read(6) == b"theirs"


@pytest.mark.parametrize("place", ["entry", "scratch"])
def test_a_full_disk_is_named(own_cache, place):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as caught:
        if place == "entry":
            cache.entry(cache.folder("things") / "x", full)
        else:
            with cache.scratch("states"):
                full()
    assert str(own_cache) in caught.value.filename
    assert not [path for path in own_cache.rglob("*") if path.is_file()]
