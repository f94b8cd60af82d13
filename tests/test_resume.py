"""Interruptions: what was finished is kept, what is resumed ends in the same bytes, nothing half-done looks complete."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from interruptions import stop_after
from jamba_models import make_jamba
from pruning_oracle import apply as run_pruning
from pruning_oracle import make_source

import cli
from compress.apply import pipeline, surveys, sweep
from compress.calibration.inputs import LayerInputs
from compress.check import judge
from compress.checkpoint.writer import ShardWriter
from compress.errors import InputError
from compress.passes.prune_experts import PruneExperts
from compress.passes.pruning import prune as pruning_layer
from exporters.graph.builder import WeightFile

LAYERS, SHARDS = 6, 8  # of the small model: one shard for the embedding, one a layer, one for the head
NO_CHECK = ("--set", "check=null")
CHECK = ("--set", "check.prompts=[self]", "--set", "check.samples=1", "--set", "check.length=8")
CHECK = (*CHECK, "--set", "check.limits={}")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def apply(compress_cli, small, out):
    def run(*arguments, model=small, check=NO_CHECK, to=out):
        return compress_cli("apply", "tiny-int8", "-m", model, "-o", to, *check, *arguments)

    return run


@pytest.fixture(scope="module")
def uninterrupted(compress_cli, small, tmp_path_factory) -> dict[str, str]:
    """Digests of the artifacts of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert compress_cli("apply", "tiny-int8", "-m", small, "-o", folder, *NO_CHECK).exit_code == 0
    return digests(folder)


def digests(folder: Path) -> dict[str, str]:
    """Of the checkpoint and the export, by path."""
    paths = [path for kind in ("checkpoint", "onnx") for path in (folder / kind).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the last change of every file: the same only where nothing was written."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def finished_shards(out: Path) -> dict[str, tuple[int, int]]:
    partial = out.with_name("out.partial")
    return {name: i for name, i in identities(partial).items() if name.endswith(".safetensors")}


def layers_reused(out: Path) -> int:
    return json.loads((out / "report.json").read_text())["passes"][0]["details"]["layers_reused"]


@pytest.mark.parametrize("done", [1, 4, SHARDS - 1])
def test_finished_shards_are_kept_and_the_rest_is_the_same(apply, out, monkeypatch, uninterrupted, done):
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", done)
        assert apply().exit_code == 130
    assert not out.exists()
    kept = finished_shards(out)
    assert len(kept) == done
    assert apply("--resume").exit_code == 0
    now = identities(out)
    assert {name: now[name] for name in kept} == kept
    assert layers_reused(out) == done - 1  # the first shard is the embedding
    assert digests(out) == uninterrupted
    assert not out.with_name("out.partial").exists()


def test_a_run_may_be_interrupted_again_and_again(apply, out, monkeypatch, uninterrupted):
    for _ in range(3):
        with monkeypatch.context() as patch:
            stop_after(patch, sweep, "ShardWriter", 2)
            assert apply("--resume").exit_code == 130
    assert apply("--resume").exit_code == 0
    assert layers_reused(out) == 5
    assert digests(out) == uninterrupted


def test_an_interrupted_export_does_not_compress_again(apply, out, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        stop_after(patch, WeightFile, "add", 20)
        assert apply().exit_code == 130
    kept = finished_shards(out)
    assert len(kept) == SHARDS
    assert apply("--resume").exit_code == 0
    now = identities(out)
    assert {name: now[name] for name in kept} == kept
    assert layers_reused(out) == LAYERS
    assert digests(out) == uninterrupted


def test_an_interrupted_check_does_not_export_again(apply, out, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        stop_after(patch, judge, "compare", 1)
        assert apply(check=CHECK).exit_code == 130
    assert not out.exists()
    kept = identities(out.with_name("out.partial") / "onnx")
    assert apply("--resume", check=CHECK).exit_code == 0
    assert identities(out / "onnx") == kept
    report = json.loads((out / "report.json").read_text())
    assert {row["artifact"] for row in report["checks"]} == {"checkpoint", "onnx"}
    card = "checkpoint/README.md"  # quotes the recipe, which has a check here
    assert {**digests(out), card: None} == {**uninterrupted, card: None}


def test_an_interruption_while_the_folder_gets_its_name_can_be_resumed(apply, out, monkeypatch, uninterrupted):
    real = os.replace

    def stopped(source, target):
        if Path(target) == out:
            raise KeyboardInterrupt
        return real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stopped)
        assert apply().exit_code == 130
    result = apply("--resume")
    assert result.exit_code == 0, result.stderr
    assert digests(out) == uninterrupted


def test_a_run_that_replaces_an_output_can_be_resumed_and_keeps_it_until_then(apply, out, monkeypatch):
    assert apply("--seed", 1).exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 3)
        assert apply("--overwrite").exit_code == 130
    assert json.loads((out / "manifest.json").read_text())["seed"] == 1
    assert apply("--overwrite", "--resume").exit_code == 0
    assert json.loads((out / "manifest.json").read_text())["seed"] == 0
    assert layers_reused(out) == 2


def test_a_shard_that_lost_its_end_is_written_again(apply, out, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 4)
        assert apply().exit_code == 130
    shard = next(out.with_name("out.partial").glob("checkpoint/model-00002-*.safetensors"))
    os.truncate(shard, shard.stat().st_size // 2)
    assert apply("--resume").exit_code == 0
    assert layers_reused(out) == 2
    assert digests(out) == uninterrupted


def flip_a_bit(path: Path) -> None:
    """In the middle of the file: a safetensors header and the size stay as they are."""
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 4
    path.write_bytes(data)


def test_a_finished_shard_in_which_a_bit_was_flipped_is_written_again(apply, out, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 4)
        assert apply().exit_code == 130
    flip_a_bit(next(out.with_name("out.partial").glob("checkpoint/model-00002-*.safetensors")))
    assert apply("--resume").exit_code == 0
    assert layers_reused(out) == 2
    assert digests(out) == uninterrupted


@pytest.mark.parametrize("damaged", ["onnx/model.onnx.data", "onnx/model.onnx", "onnx/genai_config.json"])
def test_a_finished_export_in_which_a_bit_was_flipped_is_made_again(apply, out, monkeypatch, uninterrupted, damaged):
    with monkeypatch.context() as patch:
        stop_after(patch, pipeline.manifest, "build", 0)
        assert apply().exit_code == 130
    flip_a_bit(out.with_name("out.partial") / damaged)
    kept = finished_shards(out)
    assert apply("--resume").exit_code == 0
    now = identities(out)
    assert {name: now[name] for name in kept} == kept
    assert digests(out) == uninterrupted


def test_an_export_of_a_damaged_shard_is_made_again_with_it(apply, out, monkeypatch, uninterrupted):
    """The bit was flipped before the export read it."""
    real = pipeline.exporting.export_to

    def damaged(exporter, kind, written, folder):
        flip_a_bit(written.files.paths[3])
        return real(exporter, kind, written, folder)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.exporting, "export_to", damaged)
        stop_after(patch, pipeline.manifest, "build", 0)
        assert apply().exit_code == 130
    assert apply("--resume").exit_code == 0
    assert digests(out) == uninterrupted


JOURNALS = {
    "garbage": lambda text: "\0" * len(text),
    "cut short": lambda text: text[: len(text) // 2],
    "not what it should be": lambda text: "[1]",
    "of a version without digests": lambda text: json.dumps(
        {**json.loads(text), "done": {name: noted["bytes"] for name, noted in json.loads(text)["done"].items()}}
    ),
}


@pytest.mark.parametrize("damage", JOURNALS.values(), ids=list(JOURNALS))
def test_a_run_whose_journal_cannot_be_read_is_not_resumed(apply, out, stopped, damage):
    journal = stopped / "journal.json"
    journal.write_text(damage(journal.read_text()))
    before = identities(stopped)
    result = apply("--resume")
    assert result.exit_code == 2 and "--overwrite" in result.stderr
    assert identities(stopped) == before
    assert apply("--overwrite").exit_code == 0


@pytest.fixture
def stopped(apply, out, monkeypatch) -> Path:
    """The folder of a run that was stopped after three shards."""
    with monkeypatch.context() as patch:
        stop_after(patch, sweep, "ShardWriter", 3)
        assert apply().exit_code == 130
    return out.with_name("out.partial")


CHANGES = {
    "recipe": ("--set", "passes.0.quantize.roles={lm_head: none}"),
    "seed": ("--seed", 1),
}


@pytest.mark.parametrize(("what", "change"), CHANGES.items(), ids=list(CHANGES))
def test_a_different_job_is_not_resumed(apply, out, stopped, uninterrupted, what, change):
    before = identities(stopped)
    result = apply("--resume", *change)
    assert result.exit_code == 2
    assert what in result.stderr
    assert not out.exists()
    assert identities(stopped) == before
    assert apply("--resume").exit_code == 0
    assert digests(out) == uninterrupted


def test_a_different_model_is_not_resumed(apply, out, stopped, tmp_path):
    result = apply("--resume", model=make_jamba(tmp_path / "other", seed=1))
    assert result.exit_code == 2
    assert "model" in result.stderr
    assert not out.exists()


def test_a_folder_that_no_run_left_behind_is_not_resumed(apply, out):
    out.with_name("out.partial").mkdir()
    (out.with_name("out.partial") / "thesis.txt").touch()
    assert apply("--resume").exit_code == 2
    assert (out.with_name("out.partial") / "thesis.txt").is_file()


def test_resume_starts_fresh_where_there_is_nothing(apply, out, uninterrupted):
    assert apply("--resume").exit_code == 0
    assert layers_reused(out) == 0
    assert digests(out) == uninterrupted


KILLED = """
import os, signal, sys
import cli
from compress.apply import sweep
from exporters.graph.builder import WeightFile

def kill_after(owner, name, calls):
    real, left = getattr(owner, name), iter(range(calls))
    def killed(*arguments):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)
    setattr(owner, name, killed)

kill_after({owner}, "{name}", {calls})
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("owner", "name", "calls"), [("os", "pwrite", 100), ("WeightFile", "add", 20)], ids=["writing a shard", "exporting"]
)
def test_a_killed_process_leaves_nothing_that_looks_complete_and_can_be_resumed(
    apply, small, out, uninterrupted, owner, name, calls
):
    """The kill comes from inside the process at a fixed call, so that nothing depends on time."""
    code = KILLED.format(owner=owner, name=name, calls=calls)
    command = [sys.executable, "-c", code, "apply", "tiny-int8", "-m", str(small), "-o", str(out), *NO_CHECK]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent)}
    result = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not out.exists()
    assert not list(out.with_name("out.partial").rglob("manifest.json"))
    assert apply("--resume").exit_code == 0
    assert layers_reused(out) > 0
    assert digests(out) == uninterrupted
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


PRUNINGS = {
    "uniform": ({"keep": 3},),
    "a budget": ({"budget": 0.39},),
    "a budget, then gptq": ({"budget": 0.39}, {"quantize": {"method": "gptq", "weights": "int8"}}),
}
WALKED = 6  # layers that a survey leaves


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory) -> Path:
    """MoE layers 1 and 4 of six."""
    return make_source(tmp_path_factory.mktemp("with-experts"))


@pytest.fixture(scope="module")
def uninterrupted_prunings(with_experts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prunings")
    return {name: run_pruning(with_experts, folder / name, *passes) for name, passes in PRUNINGS.items()}


def interrupt_pruning(model: Path, folder: Path, name: str, owner, attribute: str, calls: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, owner, attribute, calls)
        with pytest.raises(KeyboardInterrupt):
            run_pruning(model, folder, *PRUNINGS[name])
    assert not (folder / "out").exists() and (folder / "out.partial").is_dir()


@pytest.mark.parametrize("name", PRUNINGS)
@pytest.mark.parametrize(
    ("owner", "attribute", "calls", "reused"),
    [
        (ShardWriter, "publish", 4, 3),  # between two layers that are pruned
        (pruning_layer, "collect", 1, 4),  # as layer 4 is begun
        (pruning_layer.Correction, "recover", 1, None),  # in the middle of the first layer that loses some
    ],
    ids=["between", "begun", "middle"],
)
def test_a_pruning_that_was_interrupted_resumes_to_the_same_bytes(
    with_experts, uninterrupted_prunings, tmp_path, monkeypatch, name, owner, attribute, calls, reused
):
    if attribute == "recover":
        calls = 0
    interrupt_pruning(with_experts, tmp_path, name, owner, attribute, calls)
    surveyed = []
    monkeypatch.setattr(PruneExperts, "survey", lambda *arguments: surveyed.append(arguments))
    resumed, expected = run_pruning(with_experts, tmp_path, *PRUNINGS[name], resume=True), uninterrupted_prunings[name]
    assert not surveyed, "what the survey found is kept"
    assert resumed.digests == expected.digests
    assert reused in (None, resumed.details["layers_reused"])
    for found, whole in zip(resumed.report["passes"], expected.report["passes"], strict=True):
        assert found["details"] | {"layers_reused": 0} == whole["details"]
    assert not list(resumed.out.rglob("*.f32"))


@pytest.mark.parametrize("calls", [1, 4])
def test_an_interrupted_survey_is_made_anew(with_experts, uninterrupted_prunings, tmp_path, monkeypatch, calls):
    interrupt_pruning(with_experts, tmp_path, "a budget", LayerInputs, "leave", calls)
    walked = []
    real = surveys.walk
    monkeypatch.setattr(surveys, "walk", lambda *arguments: walked.append(arguments) or real(*arguments))
    resumed = run_pruning(with_experts, tmp_path, *PRUNINGS["a budget"], resume=True)
    assert len(walked) == 1
    assert resumed.digests == uninterrupted_prunings["a budget"].digests
    assert resumed.details["layers_reused"] == 0


def test_a_complete_survey_is_not_made_again(with_experts, uninterrupted_prunings, tmp_path, monkeypatch):
    interrupt_pruning(with_experts, tmp_path, "a budget", LayerInputs, "leave", WALKED + 2)
    monkeypatch.setattr(surveys, "walk", None)
    resumed = run_pruning(with_experts, tmp_path, *PRUNINGS["a budget"], resume=True)
    assert resumed.digests == uninterrupted_prunings["a budget"].digests
    assert resumed.details["layers_reused"] == 2


def test_findings_of_a_survey_in_which_a_bit_was_flipped_are_made_again(
    with_experts, uninterrupted_prunings, tmp_path, monkeypatch
):
    interrupt_pruning(with_experts, tmp_path, "a budget", LayerInputs, "leave", WALKED + 2)
    findings = tmp_path / "out.partial" / "calibration" / "survey-0.json"
    findings.write_text(findings.read_text().replace("3", "4"))
    resumed = run_pruning(with_experts, tmp_path, *PRUNINGS["a budget"], resume=True)
    assert resumed.digests == uninterrupted_prunings["a budget"].digests


def test_a_pruning_with_another_amount_is_not_resumed(with_experts, tmp_path):
    interrupt_pruning(with_experts, tmp_path, "uniform", ShardWriter, "publish", 3)
    with pytest.raises(InputError, match="recipe changed"):
        run_pruning(with_experts, tmp_path, {"keep": 4}, resume=True)


def test_a_run_that_is_stopped_while_it_publishes_keeps_what_its_report_tells(
    with_experts, uninterrupted_prunings, tmp_path
):
    interrupt_pruning(with_experts, tmp_path, "a budget", pipeline.manifest, "build", 0)
    resumed, expected = run_pruning(with_experts, tmp_path, *PRUNINGS["a budget"], resume=True), uninterrupted_prunings
    assert resumed.details["layers"] == expected["a budget"].details["layers"]
    assert resumed.digests == expected["a budget"].digests
    assert not (resumed.out / "calibration").exists()
