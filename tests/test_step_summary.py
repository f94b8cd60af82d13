"""The page of a step in GitHub Actions."""

import json
import os

import pytest
import report_samples

from compress.report import markdown, step_summary

MIB = 1 << 20
QUICK = ("--prompts", "self", "--samples", 1, "--length", 12)


@pytest.fixture
def summary(tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return tmp_path / "summary.md"


def test_check_appends_to_what_is_there(compress_cli, small, summary):
    summary.write_text("# Of an earlier command")
    for _ in range(2):
        assert compress_cli("check", small, small, *QUICK).exit_code == 0
    first, *others = summary.read_text().split("\n# ")
    assert first == "# Of an earlier command"
    assert len(others) == 2 and all("not checked" in part and "<details>" in part for part in others)


def test_apply_appends_its_report(compress_cli, small, summary, tmp_path):
    arguments = ("apply", "tiny-int8", "-m", small, "-o", tmp_path / "out", "--set", "check=null")
    assert compress_cli(*arguments).exit_code == 0
    assert summary.read_text() == (tmp_path / "out" / "report.md").read_text()


def test_json_on_stdout_stays_json(compress_cli, small, summary):
    assert json.loads(compress_cli("check", small, small, *QUICK, "--json", "-").stdout)["schema"] == 1
    assert summary.stat().st_size > 0


@pytest.mark.parametrize("place", ["no/such/folder/summary.md", ".", "a\0b"])
def test_a_place_that_cannot_be_written_is_a_warning(capsys, monkeypatch, tmp_path, place):
    monkeypatch.setattr(os, "environ", {"GITHUB_STEP_SUMMARY": str(tmp_path / place)})
    step_summary.append("text")
    assert "warning: GITHUB_STEP_SUMMARY: " in capsys.readouterr().err


def test_nothing_is_written_where_the_variable_is_empty_or_not_set(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for environment in ({}, {"GITHUB_STEP_SUMMARY": ""}):
        monkeypatch.setattr(os, "environ", environment)
        step_summary.append("text")
    assert list(tmp_path.iterdir()) == []


def large() -> str:
    sample = report_samples.report()
    sample["worst_prompts"] = [report_samples.worst("onnx", n) | {"text": "\u732b" * 300} for n in range(400)]
    sample["worst_prompts"] = [
        row | {"baseline_text": row["text"], "candidate_text": row["text"]} for row in sample["worst_prompts"]
    ]
    return markdown.render(sample, [])


def test_what_is_too_long_loses_details_the_longest_first(summary):
    text = large()
    assert len(text.encode()) > MIB
    step_summary.append(text)
    written = summary.read_text()
    assert summary.stat().st_size <= MIB
    assert written.startswith(text.split("<details>")[0])
    assert "Details were left out" in written and "Worst prompts" not in written and "Weight audit" in written


def test_what_earlier_commands_of_the_step_wrote_counts(summary):
    text = markdown.render(report_samples.report(), [])
    summary.write_text("x" * (MIB - len(text.encode()) + 100))
    step_summary.append(text)
    assert summary.stat().st_size <= MIB
    assert text.split("<details>")[0] in summary.read_text()
    summary.write_text("x" * (MIB - 10))
    step_summary.append(text)
    assert summary.stat().st_size == MIB - 10
