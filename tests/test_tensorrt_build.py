"""Engines from the command line, by a stand-in for the builder: what is written, told and refused, and how a builder may end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import builders
import psutil
import pytest
from refusals import refusal_of_command

import cli
from compress.apply import pipeline
from compress.recipe.recipe import load_recipe
from compress.recipe.source import resolve

TENSORRT = ("--to", "tensorrt")
HOW = "pip install 'compress-hybrid-llm[tensorrt-rtx]'"


@pytest.fixture(scope="module")
def int8(tmp_path_factory, small) -> Path:
    """A checkpoint with matrices in int8."""
    folder = tmp_path_factory.mktemp("int8")
    pipeline.apply(pipeline.Job(load_recipe(recipe(folder)), resolve(str(small)), folder / "out"))
    return folder / "out" / "checkpoint"


def recipe(folder: Path, **options: object) -> str:
    """In int8, with an export to TensorRT where there are options of one."""
    text = {
        "version": 1,
        "passes": [{"quantize": {"weights": "int8"}}],
        "export": [{"tensorrt": options}] if options else [],
    }
    (folder / "recipe.yaml").write_text(json.dumps(text))
    return str(folder / "recipe.yaml")


@pytest.fixture
def export(compress_cli, int8, tmp_path):
    return lambda *options: compress_cli("export", int8, *TENSORRT, "-o", tmp_path / "out", *options)


def build_json(folder: Path) -> dict:
    return json.loads((folder / "build.json").read_text())


def test_without_a_builder_the_graph_is_written_and_it_is_said_how_to_build(export, tmp_path):
    result = export()
    assert result.exit_code == 0
    assert HOW in result.stderr and "no engine was built" in result.stderr
    facts = build_json(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").is_file() and not (tmp_path / "out" / "model.engine").exists()
    assert facts["engine"] is None and HOW in facts["why_not_built"] and facts["executed"] is False
    assert (facts["builder"], facts["seconds"], facts["layers"]) == (None, None, [])


def test_a_report_says_that_no_engine_was_built_and_how(compress_cli, small, tmp_path):
    result = compress_cli("apply", recipe(tmp_path, build="auto"), "-m", small, "-o", tmp_path / "out")
    assert result.exit_code == 0
    page = (tmp_path / "out" / "report.html").read_text().replace("&#39;", "'")
    for text in (result.stdout.replace("\n", " "), (tmp_path / "out" / "report.md").read_text(), page):
        assert "no engine was built" in text
    assert HOW in page
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    artifact = report["artifacts"][1]
    assert artifact["build"] == build_json(tmp_path / "out" / "tensorrt")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "tensorrt/build.json" in manifest["files"]


def test_a_required_builder_that_is_missing_is_bad_input_before_any_work(compress_cli, small, tmp_path, export):
    path = recipe(tmp_path, build="required")
    for more in ((), ("--dry-run",)):
        message = refusal_of_command(compress_cli("apply", path, "-m", small, "-o", tmp_path / "out", *more))
        assert "build is required, but no builder is installed" in message and HOW in message
    assert "build is required" in refusal_of_command(export("--set", "build=required"))
    assert not [*tmp_path.glob("out*")]


def test_a_dry_run_says_whether_an_engine_will_be_built(compress_cli, small, tmp_path):
    def plan(**options: object) -> str:
        lines = compress_cli("apply", recipe(tmp_path, **options), "-m", small, "--dry-run").stdout.splitlines()
        return next(line for line in lines if line.startswith("builds"))

    assert f"no model.engine: no builder is installed; {HOW}" in plan(build="auto")
    with builders.stand_in(tmp_path):
        assert plan(batch=3).endswith("model.engine with TensorRT 99.1: batch 3, prompts of 512 tokens, context 4096")
        assert plan(build="never").endswith("no model.engine: build: never")


@pytest.mark.parametrize(
    ("option", "said"),
    [("batch=0", "batch"), ("context=-1", "context"), ("prefill_length=yes", "prefill_length"), ("build=maybe", "build"),
     ("context=100", "prefill_length is 512, more than the 100 tokens of context"), ("contxt=9", "did you mean 'context'")],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(export, option, said):
    assert said in refusal_of_command(export("--set", option))


def test_an_engine_is_built_beside_the_graph_with_what_is_known_of_it(export, tmp_path, int8):
    with builders.stand_in(tmp_path):
        result = export("--set", "prefill_length=128", "--set", "context=256", "--set", "build=required")
    assert (result.exit_code, result.stdout) == (0, ""), result.stderr
    out, facts = tmp_path / "out", build_json(tmp_path / "out")
    assert (facts["engine"], facts["builder"], facts["version"]) == ("model.engine", "TensorRT", "99.1")
    assert facts["engine_bytes"] == (out / "model.engine").stat().st_size
    assert facts["engine_weight_bytes"] == (out / "model.onnx.data").stat().st_size
    assert (facts["activation_bytes"], facts["executed"], facts["why_not_built"]) == (4321, False, None)
    assert facts["not_for"] == ["sm80", "sm86"] and "(not for sm80, sm86)" in result.stderr
    assert facts["peak_rss_bytes"] > 1 << 20 and facts["seconds"] >= 0
    assert [profile["name"] for profile in facts["profiles"]] == ["prefill", "decode"]
    assert facts["profiles"][0]["inputs"]["input_ids"]["max"][1] == 128
    assert facts["widened"] == [] and {row["precision"] for row in facts["layers"]} == {"int8"}
    stored = cli_inspect(int8)
    assert len(facts["layers"]) == stored
    log = (out / "build.log").read_text()
    assert "what a library prints" in log and "INFO: Total Weights Memory" in log


def cli_inspect(checkpoint: Path) -> int:
    """Matrices in int8."""
    from compress.checkpoint.reader import Checkpoint

    model = Checkpoint(checkpoint, allow_quantized=True).model
    return sum(weight.format == "int8" for weight in model.weights)


def test_build_never_builds_nothing(export, tmp_path):
    with builders.stand_in(tmp_path):
        assert export("--set", "build=never").exit_code == 0
    assert build_json(tmp_path / "out")["why_not_built"] == "build: never"
    assert not (tmp_path / "out" / "model.engine").exists()


def test_timings_are_kept_for_the_next_build(compress_cli, int8, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    with builders.stand_in(tmp_path):
        for number in range(2):
            assert compress_cli("export", int8, *TENSORRT, "-o", tmp_path / str(number)).exit_code == 0
    (kept,) = (tmp_path / "cache" / "timings").iterdir()
    assert kept.name == "TensorRT-99.1" and kept.read_bytes().startswith(b"timed timed ")


ENDS = {
    "aborts": "the builder was ended by SIGABRT",
    "is killed": "the builder was ended by SIGKILL, as the system does where memory runs out",
    "exits": "the builder ended with exit code",
    "raises": "std::bad_alloc",
    "fails": "Internal Error (layer MatMul_1: no kernel in",
    "refuses TopK": "layer 1: TopK '",
}


@pytest.mark.parametrize("does", ENDS)
def test_however_a_builder_fails_the_command_fails_with_one_sentence_and_keeps_its_log(
    export, tmp_path, monkeypatch, does
):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    with builders.stand_in(tmp_path, does):
        message = refusal_of_command(export(), code=3)
    assert message.startswith("compress: export to tensorrt: ") and ENDS[does] in message
    assert "cudaError 35" not in message
    assert not [*tmp_path.glob("out*")]
    log = tmp_path / "cache" / "engine" / "build.log"
    assert str(log) in message and log.is_file()


def test_a_failed_build_is_tried_again_by_resume_and_nothing_else_is(compress_cli, small, tmp_path):
    command = ("apply", recipe(tmp_path, build="required"), "-m", small, "-o", tmp_path / "out")
    with builders.stand_in(tmp_path, "aborts"):
        refused = compress_cli(*command)
    assert refused.exit_code == 3 and "SIGABRT" in refused.stderr
    with builders.stand_in(tmp_path):
        result = compress_cli(*command, "--resume")
    assert result.exit_code == 0 and "reused from the earlier run" in result.stdout
    assert build_json(tmp_path / "out" / "tensorrt")["engine"] == "model.engine"


def test_a_builder_that_needs_a_gpu_is_no_builder(export, tmp_path):
    with builders.stand_in(tmp_path, "needs a GPU"):
        result = export()
        assert result.exit_code == 0 and "TensorRT 99.1 makes no builder here, which may need a GPU" in result.stderr
        message = refusal_of_command(export("-o", tmp_path / "other", "--set", "build=required"))
    assert "makes no builder here" in message and HOW in message
    assert "and onnxruntime_ep_nv_tensorrt_rtx has no libcudart.so" in message


def test_a_package_that_cannot_be_loaded_is_no_builder(export, tmp_path):
    with builders.stand_in(tmp_path, "cannot be imported"):
        result = export()
    assert result.exit_code == 0
    assert "tensorrt cannot be loaded (libnvinfer.so.99: cannot open shared object file)" in result.stderr


WIDENED = {
    "widens layer 1": (".layers.1.", "meant to be int8, bf16 according to the network"),
    "widens": ("", "bytes where"),
}


@pytest.mark.parametrize("does", WIDENED)
def test_an_export_with_widened_layers_is_written_and_missed(export, tmp_path, does):
    with builders.stand_in(tmp_path, does):
        result = export()
    assert result.exit_code == 1
    where, words = WIDENED[does]
    widened = build_json(tmp_path / "out")["widened"]
    assert widened and all(where in name for name in widened)
    assert widened[0] in result.stderr and words in result.stderr


def test_a_widened_layer_makes_the_verdict_fail_and_is_named_everywhere(compress_cli, small, tmp_path):
    with builders.stand_in(tmp_path, "widens layer 1"):
        result = compress_cli("apply", recipe(tmp_path, build="auto"), "-m", small, "-o", tmp_path / "out")
    assert result.exit_code == 1
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"] == "fail"
    failed = [row["tensor"] for row in report["audit"] if not row["passed"]]
    assert failed == build_json(out / "tensorrt")["widened"]
    for text in (
        result.stdout,
        (out / "report.md").read_text(),
        (out / "report.html").read_text(),
        (out / "junit.xml").read_text(),
    ):
        assert failed[0] in text.replace("\n", "") and "widened in the engine" in text.replace("\n", " ")
    assert "<failure" in (out / "junit.xml").read_text()


def test_a_later_check_of_the_graph_knows_of_the_engine(compress_cli, export, small, tmp_path):
    with builders.stand_in(tmp_path, "widens layer 1"):
        export("--set", "precision=fp32")
    brief = ("--prompts", "self", "--samples", 1, "--length", 8, "--json", tmp_path / "check.json")
    result = compress_cli("check", small, tmp_path / "out", *brief)
    found = json.loads((tmp_path / "check.json").read_text())
    failed = {row["tensor"] for row in found["audit"] if not row["passed"]}
    assert (result.exit_code, found["verdict"], failed) == (1, "fail", {*build_json(tmp_path / "out")["widened"]})


@pytest.fixture
def waiting(int8, tmp_path):
    """The command, and the process that builds for it, which will not end."""
    with builders.stand_in(tmp_path, "waits"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
        command = [sys.executable, cli.__file__, "export", str(int8), *TENSORRT, "-o", str(tmp_path / "out")]
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_interrupts
        )
        try:
            yield process, builder_of(process)
        finally:
            process.kill()
            process.wait()


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores them, and so would whatever that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def builder_of(process) -> psutil.Process:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children():
            if is_building(child):
                return child
        time.sleep(0.1)
    raise AssertionError("nothing was built")


def is_building(child: psutil.Process) -> bool:
    """Once it has printed, it waits."""
    log = Path(child.cmdline()[-1]) if child.cmdline() else Path()
    return log.name == "build.log" and log.is_file() and "Total Activation" in log.read_text()


def test_a_command_that_is_stopped_takes_the_builder_along(waiting, tmp_path):
    process, builder = waiting
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    assert psutil.wait_procs([builder], 30)[1] == []
    assert not [*tmp_path.glob("out*")]


def test_a_builder_does_not_outlive_a_command_that_is_killed(waiting):
    process, builder = waiting
    process.kill()
    assert psutil.wait_procs([builder], 30)[1] == []


def test_a_disk_without_room_for_the_engine_is_noticed_before_work_begins(compress_cli, small, tmp_path, monkeypatch):
    """The graph alone would fit."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100 << 20))
    arguments = ("apply", recipe(tmp_path, precision="bf16"), "-m", small, "--set", "check=null", "-o")
    with builders.stand_in(tmp_path):
        said = refusal_of_command(compress_cli(*arguments, tmp_path / "with"))
    assert "MiB are needed for the output" in said and not (tmp_path / "with").exists()
    assert compress_cli(*arguments, tmp_path / "without").exit_code == 0
