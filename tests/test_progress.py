"""What `apply` says while it works: numbered stages, as one bar on a terminal and as lines of a log, and what it reuses."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interruptions import stop_after

import cli
from compress.apply import pipeline, sweep
from compress.check import judge
from compress.output_folder.workspace import Workspace
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve
from compress.terminal import progress

STAGE = re.compile(r"(\d+) of (\d+): (.+): done in \d+\.\d minutes")
CALIBRATED = """
version: 1
calibration: {prompts: [self], samples: 16, length: 64}
passes:
  - prune_experts: {budget: 0.4}
  - quantize: {method: gptq}
export: [onnx: {}]
check: {prompts: [self], samples: 2, length: 16}
"""


@pytest.fixture
def apply(compress_cli, tmp_path, small):
    """`apply` of the small model, the check on its own text, into `out` below the test's own folder."""
    quick = ("check.prompts=[self]", "check.samples=2", "check.length=16", "check.limits={}")

    def run(*arguments):
        overrides = [part for value in quick for part in ("--set", value)]
        return compress_cli("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", *overrides, *arguments)

    return run


def stages(stdout: str) -> list[tuple[int, int, str]]:
    found = [STAGE.fullmatch(line) for line in stdout.splitlines()]
    return [(int(m[1]), int(m[2]), m[3]) for m in found if m]


def test_a_log_has_a_line_for_every_stage_and_then_the_table(apply, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    result = apply()
    assert (result.exit_code, result.stderr) == (0, "")
    names = [
        "compressing",
        "exporting onnx",
        *(f"{artifact}: audit of {what}" for artifact in ("checkpoint", "onnx") for what in ("weights", "layers")),
        "prompts: self",
        "baseline on self",
        *(f"{artifact}: {phase} on self" for artifact in ("checkpoint", "onnx") for phase in ("prefill", "decode")),
    ]
    assert stages(result.stdout) == [(number, 12, name) for number, name in enumerate(names, 1)]
    rest = result.stdout.splitlines()[12:]
    assert "bytes of weights" in rest[0]
    assert rest[-1].startswith("verdict: ")
    assert "\x1b" not in result.stdout and "\r" not in result.stdout


def test_every_stage_of_a_calibrated_recipe_is_counted(compress_cli, small, monkeypatch, tmp_path):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(CALIBRATED)
    result = compress_cli("apply", tmp_path / "recipe.yaml", "-m", small, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    counted = stages(result.stdout)
    last = len(counted)
    assert [(number, of) for number, of, _ in counted] == [(number, last) for number in range(1, last + 1)]
    names = [name for *_, name in counted]
    assert names[:5] == ["prompts: self", "survey", "compressing", "exporting onnx", "checkpoint: audit of weights"]


def test_what_the_cache_has_is_no_stage_and_the_numbers_go_on(apply):
    apply()
    said = apply("--overwrite").stdout
    counted = stages(said)
    assert "baseline on self" not in [name for *_, name in counted]
    assert [number for number, *_ in counted] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert said.splitlines()[7] == "8 of 12: baseline on self: kept from before"


@pytest.mark.parametrize(("silence", "lines"), [(60.0, 0), (0.0, 1)])
def test_what_fails_early_says_one_sentence_and_later_its_log_too(
    compress_cli, small, tmp_path, monkeypatch, silence, lines
):
    monkeypatch.setattr(progress, "SILENCE", silence)
    (tmp_path / "recipe.yaml").write_text(CALIBRATED.replace("samples: 16, length: 64", "samples: 2, length: 16"))
    result = compress_cli("apply", tmp_path / "recipe.yaml", "-m", small, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "too few" in result.stderr and len(result.stderr.splitlines()) == 1
    assert len(stages(result.stdout)) == len(result.stdout.splitlines()) == lines


def test_a_long_stage_is_told_of_in_between(apply, monkeypatch):
    assert "%" not in apply("--set", "check=null").stdout
    monkeypatch.setattr(progress, "EVERY", 0.0)
    between = re.findall(
        r"^1 of 2: compressing: (\d+)% in \d\.\d minutes$", apply("--overwrite", "--set", "check=null").stdout, re.M
    )
    shares = list(map(int, between))
    assert len(shares) > 5
    assert shares == sorted(shares)
    assert shares[-1] == 100


def test_lines_are_written_when_they_are_said(monkeypatch, tmp_path):
    """A run that is killed leaves them in its log."""
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    with open(tmp_path / "log", "w") as log, progress.logged(), progress.stages(["one", "two"]):
        monkeypatch.setattr(sys, "stdout", log)
        with progress.task("one", 1) as advance:
            advance(1)
        assert stages((tmp_path / "log").read_text()) == [(1, 2, "one")]
        monkeypatch.undo()


def test_lines_that_waited_do_not_wait_for_the_end_of_a_long_stage(monkeypatch, capsys):
    with progress.logged(), progress.stages(["one", "two"]):
        with progress.task("one", 1) as advance:
            advance(1)
        with progress.task("two", 2) as advance:
            assert capsys.readouterr().out == ""
            monkeypatch.setattr(progress, "SILENCE", 0.0)
            advance(1)
            assert stages(capsys.readouterr().out) == [(1, 2, "one")]


# --- terminals


def plain(shown: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def on_a_terminal(arguments, *, log: Path) -> str:
    """What a pseudo-terminal shows of the command, whose stdout goes to a log."""
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, cli.__file__, *map(str, arguments)],
            stdin=terminal, stdout=file, stderr=terminal, env=environment,
        )  # fmt: skip
        os.close(terminal)
        shown = b""
        while block := _read(reader):
            shown += block
    os.close(reader)
    assert process.wait() == 0, shown
    return plain(shown)


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 16)
    except OSError:  # Linux says so when the other end is closed
        return b""


def test_a_terminal_shows_one_bar_and_no_lines(monkeypatch):
    reader, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with open(terminal, "w") as file:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, file)
        with progress.stages(["one", "two"]):
            for name in ("reading", "one", "two"):
                with progress.task(name, 1) as advance, progress.task("a part", 1):
                    advance(1)
            progress.tell("something else")
        file.flush()
        shown = plain(os.read(reader, 1 << 16))
        monkeypatch.undo()
    os.close(reader)
    assert "done in" not in shown
    for said in ("reading ", "1 of 2: one ", "2 of 2: two ", "something else"):
        assert said in shown


def test_a_log_is_kept_beside_the_bar_of_a_terminal(small, tmp_path):
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", "--set", "check=null")
    shown = on_a_terminal(arguments, log=tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert "1 of 2: compressing" in shown
    assert "verdict" not in shown
    assert [name for *_, name in stages(said)] == ["compressing", "exporting onnx"]
    assert said.splitlines()[-1].startswith("verdict: ")
    assert "\x1b" not in said


# --- what a resumed run reuses


def reused(result) -> list[str]:
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("reused from the earlier run: ")]


def test_a_resumed_run_says_how_many_layers_it_reuses(apply, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 4)  # the embedding and three layers; the last may not be published yet
        assert apply().exit_code == 130
    (said,) = reused(apply("--resume"))
    assert re.fullmatch(r"[23] of 6 layers", said)


def test_a_resumed_run_says_which_exports_it_reuses(apply, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, judge, "compare", 1)
        assert apply().exit_code == 130
    result = apply("--resume")
    assert reused(result) == ["6 of 6 layers", "the export onnx"]
    assert "exporting onnx" not in [name for *_, name in stages(result.stdout)]


def test_a_run_that_only_had_to_get_its_name_says_that_it_reuses_all(apply, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, Workspace, "publish", 0)
        assert apply("--set", "check=null").exit_code == 130
    assert reused(apply("--set", "check=null", "--resume")) == ["6 of 6 layers", "the export onnx"]


def test_a_resumed_run_says_that_nothing_was_finished(apply, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 0)
        assert apply().exit_code == 130
    assert reused(apply("--resume")) == ["0 of 6 layers"]


def test_a_run_that_begins_says_nothing_of_reuse(apply):
    assert reused(apply()) == reused(apply("--overwrite")) == []


def test_a_program_that_calls_us_hears_nothing(small, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    loaded = load_recipe("tiny-int8", ("check=null",))
    pipeline.apply(pipeline.Job(loaded, resolve(str(small)), tmp_path / "out"))
    assert capfd.readouterr() == ("", "")
