"""How much memory there is: what the machine has, less where a container or a ulimit allows less."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from refusals import refusal, refusal_of_command

from compress.apply import exporting
from compress.errors import WorkError
from compress.runtime import memory
from compress.runtime.onnx_session import OnnxSession

GIB = 1 << 30
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
SECOND = ("memory.max", "memory.current", "inactive_file")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Has 64 GiB, half of them free; `groups(text)` says which control groups the process is in."""
    has = type("Memory", (), {"total": 64 * GIB, "available": 32 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: has)
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "GROUPS_OF_PROCESS", tmp_path / "of_process")
    return lambda text: (tmp_path / "of_process").write_text(text)


@pytest.fixture(scope="module")
def float_onnx(small, tmp_path_factory) -> Path:
    return exporting.export_checkpoint(small, "onnx", tmp_path_factory.mktemp("float") / "onnx") / "model.onnx"


def group(folder: Path, names: tuple[str, str, str], limit: str, used: int = 0, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used}\n{names[2]} {cached}\n")


def test_without_control_groups_it_is_what_the_machine_has(machine):
    assert (memory.available(), memory.total()) == (32 * GIB, 64 * GIB)


@pytest.mark.parametrize(("names", "root", "line"), [(SECOND, "groups", "0::/a/b\n"),
                                                     (FIRST, "groups/memory", "9:name=x:/\n4:cpu,memory:/a/b\n0::/\n")])  # fmt: skip
def test_the_tightest_group_around_the_process_counts(machine, tmp_path, names, root, line):
    machine(line)
    group(tmp_path / root / "a" / "b", names, str(20 * GIB), 3 * GIB)
    group(tmp_path / root / "a", names, str(8 * GIB), 5 * GIB, cached=GIB)
    assert (memory.available(), memory.total()) == (4 * GIB, 8 * GIB), "pages of files give way"


@pytest.mark.parametrize("unlimited", ["max", str((1 << 63) - 4096)])
def test_a_group_without_a_limit_takes_nothing_away(machine, tmp_path, unlimited):
    machine("0::/a\n")
    group(tmp_path / "groups" / "a", SECOND, unlimited, 60 * GIB)
    assert (memory.available(), memory.total()) == (32 * GIB, 64 * GIB)


def test_a_container_that_sees_its_group_as_the_outermost_is_found(machine, tmp_path):
    machine("4:memory:/docker/0123\n")
    group(tmp_path / "groups" / "memory", FIRST, str(2 * GIB), GIB)
    assert (memory.available(), memory.total()) == (GIB, 2 * GIB)


def test_a_group_that_is_full_leaves_nothing(machine, tmp_path):
    machine("0::/\n")
    group(tmp_path / "groups", SECOND, str(GIB), GIB + 4096)
    assert memory.available() == 0


@pytest.mark.parametrize("limit", ["DATA", "AS"])
def test_a_ulimit_counts(limit):
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_{limit}, ({GIB}, {GIB})); "
        "from compress.runtime import memory; print(memory.available(), memory.total())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    free, most = map(int, ran.stdout.split())
    assert 0 < free < GIB and most == GIB


def test_a_graph_that_does_not_fit_into_the_container_is_refused_before_it_is_loaded(tmp_path, machine):
    machine("0::/\n")
    group(tmp_path / "groups", SECOND, str(GIB), GIB - 4096)
    (tmp_path / "model.onnx").write_bytes(b"0" * 4096)
    said = refusal(lambda: OnnxSession(tmp_path / "model.onnx"))
    assert "GiB of memory to run, 0.0 GiB are free" in said


# --- memory that runs out all the same

ORT_SAYS = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running FusedMatMul node. Status Message: "
    "bfc_arena.cc:360 void* onnxruntime::BFCArena::AllocateRawInternal(size_t, bool, onnxruntime::Stream*) Failed "
)


def test_a_graph_that_runs_out_of_memory_is_failed_work_and_not_a_bad_file(float_onnx):
    session = OnnxSession(float_onnx)

    def fail(*arguments):
        raise RuntimeError(ORT_SAYS)

    session._session = type("Session", (), {"run_with_ort_values": fail})()
    with pytest.raises(WorkError, match="memory ran out while running it"):
        session.start(1).step(np.array([[3]]))


def test_memory_that_runs_out_in_torch_is_no_defect_of_ours(compress_cli, small, monkeypatch):
    monkeypatch.setattr("compress.studies.inspection.inspect", lambda *_, **__: torch.empty(1 << 58))
    result = compress_cli("inspect", small)
    assert refusal_of_command(result, code=3) == "compress: out of memory\n"


def test_other_errors_stay_what_they_are(compress_cli, small, monkeypatch):
    monkeypatch.setattr("compress.studies.inspection.inspect", lambda *_, **__: 1 / 0)
    assert "internal error" in refusal_of_command(compress_cli("inspect", small), code=3)
