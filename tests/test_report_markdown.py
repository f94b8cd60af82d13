"""report.md: what a pull request shows at a glance, what is behind a click, and that nothing in it breaks out of its place."""

import re

import pytest
import report_samples
from markdown_it import MarkdownIt
from report_samples import HOSTILE

from compress.report import markdown

SCREEN = 25  # lines


def head(text: str) -> str:
    return text.split("<details>")[0]


def test_the_first_screen_says_what_is_wrong_by_name_and_one_row_for_each_artifact():
    first = head(markdown.render(report_samples.report(), []))
    assert len(first.splitlines()) <= SCREEN
    assert first.startswith("# tiny: fail\n")
    for named in (
        "model.layers.1.feed_forward.experts.3.down_proj.weight",
        "model.layers.3.mamba.dt_proj.weight",
        "layer 1, moe, expert 3",
        "prefill perplexity_ratio",
        "better than the baseline",
        "14,787,176",
        "5,365,904",
    ):
        assert named in first
    assert "2 of 10 tensors fail the weight audit" in first
    assert "1 of 3 blocks fail the layer audit" in first
    assert "4 of 12 limits are missed" in first and "4 of 12 limits are undecided" in first
    rows = [line for line in first.splitlines() if line.startswith(("| checkpoint", "| onnx"))]
    assert len(rows) == 2
    assert "| 6.24 |" in rows[0] and "| 5.82 |" in rows[1] and "1.012 (1.0019 to 1.0221)" in rows[1]
    assert all("| **fail** |" in row for row in rows)


def test_much_that_is_wrong_does_not_push_the_artifacts_off_the_first_screen():
    sample = report_samples.report()
    sample["audit"] = [row | {"passed": False, "tensor": f"t{n}"} for n, row in enumerate(sample["audit"] * 50)]
    first = head(markdown.render(sample, []))
    assert len(first.splitlines()) <= SCREEN
    assert "500 of 500 tensors" in first and "more, below" in first


def test_an_undecided_limit_says_what_would_settle_it():
    sample = report_samples.report() | {"verdict": "undecided", "audit": [], "layer_audit": []}
    sample["checks"] = [report_samples.row("onnx", "decode", "top1_agreement")]
    first = head(markdown.render(sample, []))
    assert "about 12,000 more tokens would settle it" in first
    assert "| **undecided** |" in first


def test_the_worse_phase_stands_for_an_artifact():
    sample = report_samples.report()
    for row in sample["checks"]:
        if row["phase"] == "decode" and row["metric"] == "top1_agreement" and row["artifact"] == "onnx":
            row["value"] = 0.5
    (row,) = [line for line in head(markdown.render(sample, [])).splitlines() if line.startswith("| onnx")]
    assert "| 0.5 |" in row


def test_all_else_is_folded_under_a_line_that_says_the_main_thing():
    text = markdown.render(report_samples.report(), [])
    summaries = re.findall(r"<summary>(.*)</summary>", text)
    for said in (
        "Weight audit: 2 of 10 tensors fail",
        "Layer audit: 1 of 3 blocks fails",
        "All 32 figures: 4 missed, 4 held, 4 undecided",
        "States of a sequence",
        "Tasks: 1",
    ):
        assert said in summaries
    assert not re.search("^#", text.split("<details>", 1)[1], re.MULTILINE), "no title stands outside a fold"
    for fold in text.split("<details>")[1:]:
        assert re.match(r"<summary>[^\n]*</summary>\n\n[^\n]", fold), "GitHub reads Markdown after an empty line"
        assert fold.strip().endswith("\n\n</details>")


def test_a_run_that_checked_nothing_shows_no_empty_parts():
    text = markdown.render(report_samples.without_findings(report_samples.report()), [])
    assert text.startswith("# tiny: not checked\n")
    assert not re.search("audit|Flips|Worst|Tasks|figures|Recall", text)


def test_a_check_of_two_artifacts_has_a_report_of_the_same_kind():
    first = head(markdown.render_check(report_samples.check()))
    assert first.startswith("# out/tiny against models/tiny: fail")
    assert "experts.3.down_proj" in first and "| onnx | **fail** | 1.012" in first
    assert "bits per weight" not in first


def everywhere(value, text):
    """The sample with every string that a file or a model decides replaced."""
    names = {"artifact", "tensor", "prompts", "name", "path", "kind", "text", "baseline_text", "candidate_text", "task", "note",
             "candidate", "block", "notes", "remarks", "format", "warning", "below_threshold"}  # fmt: skip
    if isinstance(value, dict):
        return {k: everywhere_in(k in names, v, text) for k, v in value.items()}
    return [everywhere(item, text) for item in value] if isinstance(value, list) else value


def everywhere_in(named, value, text):
    if named and isinstance(value, str) and value not in ("all", "ssm_state", "length"):
        return text
    if named and isinstance(value, list) and value and isinstance(value[0], str):
        return [text for _ in value]
    return everywhere(value, text)


@pytest.mark.parametrize("render", ["report", "check"])
def test_no_name_or_text_becomes_markup(render):
    sample = everywhere(getattr(report_samples, render)(), HOSTILE)
    text = markdown.render(sample, []) if render == "report" else markdown.render_check(sample)
    assert not set(text) & (set(map(chr, range(32))) - {"\n"} | {"\u202e"})
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script" not in page and "<a " not in page and "href" not in page
    assert page.count("<details>") == page.count("</details>") == text.count("\n<details>")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, "no cell splits in two"


def test_what_is_worse_than_before_is_named_and_shown():
    sample = report_samples.without_findings(report_samples.check()) | {"verdict": "fail"}
    sample |= {"change": report_samples.changed(), "against_result": report_samples.against()}
    first = head(markdown.render_check(sample))
    assert first.startswith("# out/tiny against models/tiny: fail\n\n**2 figures are worse than before.**")
    assert "- **worse** than before: `decode perplexity`: 31 after 30, difference 1 (0.5 to 1.5)" in first
    assert "After models/tiny:" in first and "After out/old, of last.json:" in first
    assert first.count("| perplexity | decode | 30 | 31 | 1 | 0.5 to 1.5 | **worse** |") == 2
    assert "| weight\\_bytes" not in first and "| 7,000,000 | 5,365,904 | -1,634,096 |" in first
