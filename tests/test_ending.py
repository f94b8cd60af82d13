"""How a command ends when nobody reads what it says, and when it is told to stop: in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli

QUICK = ("--prompts", "self", "--samples", "1", "--length", "8")


@pytest.fixture(scope="module")
def int8(compress_cli, small, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "out"
    assert compress_cli("apply", "tiny-int8", "-m", small, "-o", out, "--set", "check=null").exit_code == 0
    return out


def command(*arguments) -> list[str]:
    return [sys.executable, cli.__file__, *map(str, arguments)]


def exit_code_unread(arguments, *, out: bool = True, err: bool = False) -> int:
    """The exit code where the other end of stdout, of stderr, or of both is closed before the command begins."""
    reader, writer = os.pipe()
    os.close(reader)
    unread = {name: writer if closed else subprocess.PIPE for name, closed in (("stdout", out), ("stderr", err))}
    process = subprocess.Popen(command(*arguments), **unread)
    os.close(writer)
    said = process.communicate()
    assert not any(b"Traceback" in text or b"Errno" in text for text in said if text), said
    return process.returncode


@pytest.mark.parametrize(
    "arguments", [("recipes",), ("recipes", "tiny-int8"), ("--help",), ("--version",)], ids=" ".join
)
def test_a_closed_pipe_does_not_change_that_text_was_printed(arguments):
    assert exit_code_unread(arguments) == 0


@pytest.mark.parametrize(("out", "err"), [(True, False), (False, True)], ids=["out", "err"])
def test_a_missed_limit_is_missed_whoever_reads(small, int8, out, err):
    arguments = ("check", small, int8, *QUICK, "--limit", "kl_divergence_mean=0", "--json", "-")
    assert exit_code_unread(arguments, out=out, err=err) == 1


def test_what_went_well_went_well_whoever_reads(small, int8):
    assert exit_code_unread(("check", small, int8, *QUICK, "--json", "-"), err=True) == 0


def test_a_name_that_the_terminal_cannot_show_changes_nothing(tiny, tmp_path):
    model = tmp_path / "日本"
    model.mkdir()
    shutil.copyfile(tiny / "config.json", model / "config.json")
    arguments = ("apply", "tiny-int8", "-m", model, "--dry-run", "--set", "check=null")
    latin = {**os.environ, "PYTHONIOENCODING": "iso-8859-1"}
    result = subprocess.run(command(*arguments), env=latin, capture_output=True, check=False)
    assert result.returncode == 0 and rb"\u65e5\u672c" in result.stdout, result.stderr


def test_bad_input_stays_bad_input_whoever_reads():
    assert exit_code_unread(("recipes", "no-such-recipe"), err=True) == 2
    assert exit_code_unread(("--no-such-option",), err=True) == 2


def test_generation_ends_when_its_reader_goes_away(tiny):
    """200,000 tokens would take minutes."""
    process = subprocess.Popen(
        command("run", tiny, "Once", "--max-tokens", 200_000, "--temperature", 9), stdout=subprocess.PIPE
    )
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=60) == 0


def test_a_result_that_could_not_be_written_is_a_failure():
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command("recipes"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (3, 1)
    assert "No space left" in result.stderr


@pytest.mark.parametrize("closed", ["0<&-", ">&-", "2>&-", "0<&- >&- 2>&-"])
def test_streams_that_were_never_open_do_no_harm(closed):
    line = f'exec "$@" {closed}'
    assert (
        subprocess.run(["sh", "-c", line, "sh", *command("recipes")], capture_output=True, check=False).returncode == 0
    )


def test_a_prompt_from_a_closed_input_is_refused(tiny):
    line = ["sh", "-c", 'exec "$@" <&-', "sh", *command("run", tiny, "-")]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)


# --- signals

# `apply` that stands still before its fourth shard, and says so by making a file
STOPPED = """
import sys, time
from pathlib import Path
import cli
from compress.apply import sweep

real, made = sweep.ShardWriter, []

def writer(*arguments):
    made.append(1)
    if len(made) == 4:
        Path(sys.argv.pop()).touch()
        for _ in range(600):  # a signal may reach another thread first: this one hears of it when it runs again
            time.sleep(0.1)
    return real(*arguments)

sweep.ShardWriter = writer
cli.main(sys.argv[1:-1])
"""


def stopped_apply(small: Path, folder: Path, *signals: int, **options) -> subprocess.CompletedProcess:
    """Starts `apply` into folder/out, sends the signals while it stands still, and waits."""
    flag = folder / "stands"
    arguments = ("apply", "tiny-int8", "-m", small, "-o", folder / "out", "--set", "check=null", flag)
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, *map(str, arguments)], stderr=subprocess.PIPE, text=True, **options
    )
    deadline = time.monotonic() + 60
    while not flag.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in signals:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return subprocess.CompletedProcess(process.args, process.returncode, None, said)


@pytest.mark.parametrize(
    ("signals", "code"),
    [([signal.SIGTERM] * 3, 143), ([signal.SIGHUP, signal.SIGTERM], 129)],
    ids=["SIGTERM three times", "SIGHUP and SIGTERM"],
)
def test_a_signal_ends_with_one_sentence_and_the_rest_can_be_resumed(compress_cli, small, tmp_path, signals, code):
    result = stopped_apply(small, tmp_path, *signals)
    assert result.returncode == code
    assert len(result.stderr.splitlines()) == 1
    assert "--resume" in result.stderr
    assert not (tmp_path / "out").exists()
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", "--set", "check=null", "--resume")
    assert compress_cli(*arguments).exit_code == 0
    details = json.loads((tmp_path / "out" / "report.json").read_text())["passes"][0]["details"]
    assert details["layers_reused"] > 0


def test_a_hangup_that_is_ignored_stays_ignored(small, tmp_path):
    """As under nohup: only the SIGTERM that follows ends it."""
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    assert stopped_apply(small, tmp_path, signal.SIGHUP, signal.SIGTERM, **ignored).returncode == 143


def test_a_command_within_a_program_leaves_its_handlers_as_they_were(compress_cli):
    def own(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, own)
    try:
        assert compress_cli("recipes").exit_code == 0
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert compress_cli("recipes").exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_command_runs_outside_the_main_thread(compress_cli):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(compress_cli, "recipes").result().exit_code == 0
