"""The command line: exit codes, what is refused before work begins, and what is left behind when work fails."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

import cli
from compress.apply import sweep
from compress.recipe import resources
from exporters.onnx import Onnx

DONE, MISSED, BAD_INPUT, FAILED, INTERRUPTED = 0, 1, 2, 3, 130  # the contract's exit codes
NO_CHECK = ("--set", "check=null")
QUICK_CHECK = ("--set", "check.prompts=[self]", "--set", "check.samples=2", "--set", "check.length=16", "--set")


@pytest.fixture
def quick(compress_cli, small, tmp_path):
    """`apply` of the quick-start recipe to the small model, check off, into `out` below the test's own folder."""

    def apply(*arguments, model=small, out=tmp_path / "out"):
        return compress_cli("apply", "tiny-int8", "-m", model, "-o", out, *NO_CHECK, *arguments)

    return apply


def expect_refusal(result, code: int = BAD_INPUT) -> str:
    """One sentence on stderr, nothing on stdout; returns the sentence."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("compress: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def run_apart(*arguments, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own, with the time of every import on stderr."""
    command = [sys.executable, "-X", "importtime", cli.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def imported(result: subprocess.CompletedProcess) -> set[str]:
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def test_a_misspelt_key_is_refused_in_one_sentence_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "recipe.yaml").write_text("version: 1\nmodel: m\npasses: [quantize: {wieghts: int8}]\n")
    result = run_apart("apply", "recipe.yaml", cwd=tmp_path)
    said = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == BAD_INPUT
    assert said == ["compress: recipe.yaml:3: unknown key 'wieghts'; did you mean 'weights'?"]
    assert "yaml" in imported(result)
    assert not {"torch", "transformers", "onnx", "onnxruntime", "optimum"} & imported(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ("apply", "tiny-int8", "--quickly"),
        ("apply",),
        ("aply", "tiny-int8"),
        ("apply", "tiny-int8", "--seed", "-1"),
        ("apply", "tiny-int8", "--device", "tpu"),
        ("apply", "tiny-int8", "--set", "check"),
        ("apply", "no-such-recipe"),
        ("apply", "tiny-int8", "-m", "no-such-model"),
        ("recipes", "no-such-recipe"),
        ("check", "no-such-model", "no-such-artifact"),
        ("run", "no-such-artifact"),
        ("inspect", "no-such-model"),
        ("export", "no-such-checkpoint", "--to", "onnx"),
        ("export", "no-such-checkpoint", "--to", "onxx"),
    ],
    ids=" ".join,
)
def test_bad_usage_exits_2_and_says_why(compress_cli, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    result = compress_cli(*arguments)
    assert result.exit_code == BAD_INPUT
    assert result.stdout == ""
    assert result.stderr
    assert files_below(tmp_path) == []


def test_a_hub_that_cannot_be_reached_exits_2(quick, monkeypatch):
    def fail(*arguments, **options):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert "someone/some-model" in expect_refusal(quick(model="someone/some-model@main"))


def test_recipes_lists_every_shipped_recipe_with_a_line(compress_cli):
    result = compress_cli("recipes")
    lines = result.stdout.splitlines()
    assert result.exit_code == DONE
    assert [line.split()[0] for line in lines] == sorted(resources.shipped_recipes())
    assert all(len(line.split()) > 3 for line in lines)


def test_recipes_prints_a_recipe_as_it_is(compress_cli):
    result = compress_cli("recipes", "tiny-int8")
    assert result.exit_code == DONE
    assert result.stdout == resources.find_recipe("tiny-int8").read_text(encoding="utf-8")


def test_a_printed_recipe_can_be_applied(compress_cli, small, tmp_path):
    (tmp_path / "mine.yaml").write_text(compress_cli("recipes", "tiny-int8").stdout)
    result = compress_cli("apply", tmp_path / "mine.yaml", "-m", small, "-o", tmp_path / "out", *NO_CHECK)
    assert result.exit_code == DONE, result.output


def test_the_output_goes_to_a_folder_named_by_the_recipe(compress_cli, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = compress_cli("apply", "tiny-int8", "-m", small, *NO_CHECK)
    assert result.exit_code == DONE, result.output
    assert (tmp_path / "out" / "tiny-int8" / "manifest.json").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny-int8"]


def test_a_recipe_without_a_model_asks_for_one(compress_cli, tmp_path):
    (tmp_path / "recipe.yaml").write_text("version: 1\npasses: [quantize: {}]\n")
    said = expect_refusal(compress_cli("apply", tmp_path / "recipe.yaml", "-o", tmp_path / "out"))
    assert "-m" in said


def test_a_complete_output_is_not_replaced_unasked(quick, tmp_path):
    assert quick().exit_code == DONE
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert "--overwrite" in expect_refusal(quick("--seed", 1))
    assert "--overwrite" in expect_refusal(quick("--seed", 1, "--resume"))
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_a_complete_output_is_replaced_when_asked(quick, tmp_path):
    assert quick().exit_code == DONE
    (tmp_path / "out" / "leftover").touch()
    assert quick("--seed", 1, "--overwrite").exit_code == DONE
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 1
    assert not (tmp_path / "out" / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_no_output_is_not_replaced_unasked(quick, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    expect_refusal(quick())
    assert files_below(tmp_path) == ["out", "out/thesis.txt"]


def test_the_folder_of_an_earlier_run_needs_resume_or_overwrite(quick, tmp_path):
    (tmp_path / "out.partial").mkdir()
    said = expect_refusal(quick())
    assert "--resume" in said
    assert "--overwrite" in said
    assert files_below(tmp_path) == ["out.partial"]


def test_overwrite_begins_anew_where_an_earlier_run_stopped(quick, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "leftover").touch()
    assert quick("--overwrite").exit_code == DONE
    assert not (tmp_path / "out" / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_dry_run_writes_no_output(compress_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = compress_cli("apply", "tiny-int8", "--dry-run")
    assert result.exit_code == DONE, result.output
    assert files_below(tmp_path) == []


def test_a_dry_run_does_not_touch_the_cache(compress_cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    assert compress_cli("apply", "tiny-int8", "--dry-run").exit_code == DONE
    assert files_below(tmp_path) == []


def test_a_dry_run_predicts_the_bytes_of_weights_that_are_written(compress_cli, tiny, applied):
    result = compress_cli("apply", "tiny-int8", "-m", tiny, "-o", "somewhere", "--dry-run")
    sizes = re.findall(r"somewhere/(\w+): about ([\d,]+) bytes", result.stdout)
    predicted = {kind: int(size.replace(",", "")) for kind, size in sizes}
    shards = sum(path.stat().st_size for path in (applied / "checkpoint").glob("*.safetensors"))
    # 2 % is what the contract asks of a plan; the shards' headers, which are not weights, are 0.8 % here
    assert predicted["checkpoint"] == pytest.approx(shards, rel=0.02)
    assert predicted["onnx"] == pytest.approx((applied / "onnx" / "model.onnx.data").stat().st_size, rel=0.02)
    assert set(predicted) == {"checkpoint", "onnx"}


def test_a_dry_run_refuses_what_the_run_would_refuse(compress_cli, small, tmp_path):
    result = compress_cli("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", "--dry-run")
    assert "tokenizer" in expect_refusal(result)


def test_cuda_without_a_cuda_device_is_refused(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda" in expect_refusal(quick("--device", "cuda"))
    assert files_below(tmp_path) == []


def test_a_missed_limit_exits_1_and_keeps_everything(compress_cli, small, tmp_path):
    out = tmp_path / "out"
    arguments = ("apply", "tiny-int8", "-m", small, "-o", out, *QUICK_CHECK)
    result = compress_cli(*arguments, "check.limits={kl_divergence_mean: 0}")
    assert result.exit_code == MISSED, result.output
    assert json.loads((out / "report.json").read_text())["verdict"] == "fail"
    assert "verdict: fail" in result.stdout
    assert "verdict: fail" in result.stderr, "the reason of an exit code that is not 0, beside the log"
    assert "\x1b" not in result.output, "no colours where no terminal is"
    for name in ("manifest.json", "checkpoint/config.json", "onnx/model.onnx", "report.md"):
        assert (out / name).is_file()
    assert not (tmp_path / "out.partial").exists()


def test_a_limit_that_holds_exits_0(compress_cli, small, tmp_path):
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", *QUICK_CHECK)
    result = compress_cli(*arguments, "check.limits={top1_agreement: 0}")
    assert result.exit_code == DONE, result.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] == "pass"


@pytest.fixture
def broken(small, tmp_path):
    """A copy of the small model to damage."""
    return Path(shutil.copytree(small, tmp_path / "broken"))


def test_weights_that_are_not_numbers_exit_2_and_leave_nothing(quick, broken, tmp_path):
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.5.feed_forward.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    said = expect_refusal(quick(model=broken))
    assert "model.layers.5.feed_forward.down_proj.weight" in said
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_truncated_model_exits_2_and_leaves_nothing(quick, broken, tmp_path):
    os.truncate(broken / "model.safetensors", (broken / "model.safetensors").stat().st_size - 1)
    assert "model.safetensors" in expect_refusal(quick(model=broken))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_already_compressed_model_is_refused(quick, tmp_path, applied):
    assert "already quantized" in expect_refusal(quick(model=applied / "checkpoint"))
    assert files_below(tmp_path) == []


def disk_with(monkeypatch, free) -> None:
    """Disks on which `free(folder)` bytes are free."""
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free(Path(folder))))


def test_a_full_disk_is_noticed_before_work_begins(quick, monkeypatch, tmp_path):
    disk_with(monkeypatch, lambda folder: 1 << 10)
    assert "MiB" in expect_refusal(quick())
    assert files_below(tmp_path) == []


def test_a_disk_too_small_for_the_baseline_is_noticed_before_work_begins(compress_cli, small, monkeypatch, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("COMPRESS_CACHE", str(cache))
    disk_with(monkeypatch, lambda folder: 1 << 10 if cache in (folder, *folder.parents) else 1 << 40)
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", *QUICK_CHECK)
    assert "baseline" in expect_refusal(compress_cli(*arguments, "check.limits={}"))
    assert not list(tmp_path.glob("out*"))


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_while_writing_exits_3_and_can_be_resumed(quick, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert "No space left" in expect_refusal(quick(), FAILED)
    assert not (tmp_path / "out").exists()
    assert quick("--resume").exit_code == DONE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_survives_the_failure_of_the_run_that_was_to_replace_it(quick, monkeypatch, tmp_path):
    assert quick().exit_code == DONE
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        expect_refusal(quick("--seed", 1, "--overwrite"), FAILED)
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("broken")], ids=lambda e: type(e).__name__)
def test_an_exporter_that_fails_exits_3_and_publishes_nothing(quick, monkeypatch, tmp_path, error):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(Onnx, "export", fail)
    result = quick()
    assert not (tmp_path / "out").exists()
    expect_refusal(result, FAILED)


def test_ctrl_c_exits_130_and_resume_finishes(quick, monkeypatch, tmp_path):
    real, written = sweep.ShardWriter, []

    def interrupted(unit, *arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(unit.name)
        return real(unit, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "ShardWriter", interrupted)
        assert "--resume" in expect_refusal(quick(), INTERRUPTED)
    assert not (tmp_path / "out").exists()
    assert quick("--resume").exit_code == DONE
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_without_a_tokenizer_is_compressed_where_nothing_needs_text(quick, tmp_path):
    result = quick()
    assert result.exit_code == DONE, result.output
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verdict"] == "not_checked"


@pytest.mark.parametrize("prompts", ["[heldout]", "[recall]", "[self, heldout]"])
def test_a_model_without_a_tokenizer_is_refused_where_text_is_needed(compress_cli, small, tmp_path, prompts):
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", "--set", f"check.prompts={prompts}")
    assert "tokenizer" in expect_refusal(compress_cli(*arguments))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("prompts", ["heldot", "missing.jsonl"])
def test_prompts_that_are_not_there_are_refused_before_work_begins(compress_cli, tiny, tmp_path, prompts):
    arguments = ("apply", "tiny-int8", "-m", tiny, "-o", tmp_path / "out", "--set", f"check.prompts=[{prompts}]")
    assert prompts in expect_refusal(compress_cli(*arguments))
    assert files_below(tmp_path) == []


def test_recall_windows_too_short_for_a_question_are_refused_before_work_begins(compress_cli, tiny, tmp_path):
    settings = ("--set", "check.prompts=[recall]", "--set", "check.length=8")
    result = compress_cli("apply", "tiny-int8", "-m", tiny, "-o", tmp_path / "out", *settings)
    assert "too short" in expect_refusal(result)
    assert files_below(tmp_path) == [], "a corrected recipe is a different job and could not resume this one"


@pytest.mark.parametrize("out", [".", "", ".."])
def test_an_output_that_holds_the_working_folder_is_refused(compress_cli, tiny, monkeypatch, tmp_path, out):
    (tmp_path / "precious").mkdir()
    monkeypatch.chdir(tmp_path / "precious")
    expect_refusal(compress_cli("apply", "tiny-int8", "-m", tiny, "-o", out, "--overwrite", "--set", "check=null"))
    assert (tmp_path / "precious").is_dir()


def test_overwrite_leaves_a_folder_alone_that_is_no_output(compress_cli, tiny, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("kept")
    arguments = ("apply", "tiny-int8", "-m", tiny, "-o", tmp_path / "letters", "--overwrite", "--set", "check=null")
    expect_refusal(compress_cli(*arguments))
    assert (tmp_path / "letters" / "dear.txt").read_text() == "kept"


def test_a_defect_of_ours_is_not_mistaken_for_a_missed_limit(compress_cli, monkeypatch, tiny):
    def broken(*arguments):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("compress.studies.inspection.inspect", broken)
    expect_refusal(compress_cli("inspect", tiny), FAILED)
