"""junit.xml: what CI systems read of limits and audits."""

import xml.etree.ElementTree as ET

import pytest
import report_samples
from report_samples import HOSTILE

from compress.report import junit

ARTIFACTS = ("checkpoint", "onnx")


def parsed(sample: dict, artifacts=ARTIFACTS, **options) -> ET.Element:
    return ET.fromstring(junit.render("tiny", sample, artifacts, **options).encode())


def cases(root: ET.Element, artifact: str) -> dict[str, ET.Element]:
    (suite,) = [suite for suite in root if suite.get("name") == artifact]
    return {case.get("name"): case for case in suite}


def assert_as_parsers_expect(root: ET.Element) -> None:
    """The rules of the JUnit schema that Jenkins, GitLab and GitHub's reporters rely on."""
    assert root.tag == "testsuites"
    assert {suite.tag for suite in root} == {"testsuite"}
    for element in (root, *root):
        found = list(element.iter("testcase"))
        assert element.get("name") and float(element.get("time")) >= 0 and element.get("errors") == "0"
        assert int(element.get("tests")) == len(found) > 0
        assert int(element.get("failures")) == sum(case.find("failure") is not None for case in found)
        assert int(element.get("skipped")) == sum(case.find("skipped") is not None for case in found)
    for case in root.iter("testcase"):
        assert case.get("classname") and float(case.get("time")) >= 0
        assert [child.tag for child in case] in ([], ["failure"], ["skipped"])
        assert all(child.get("message") and child.text for child in case)
        assert all(child.get("type") for child in case.iter("failure"))
    names = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    assert len(set(names)) == len(names), "GitLab takes equal names for one test"


def test_a_suite_for_each_artifact_and_a_case_for_each_limit_and_audit():
    root = parsed(report_samples.report())
    assert_as_parsers_expect(root)
    assert [suite.get("name") for suite in root] == list(ARTIFACTS)
    found = cases(root, "onnx")
    assert len(found) == 2 + 2 * len(report_samples.LIMITS), "rows of a prompt set, and those without a limit, are none"
    kinds = {name: case.find("failure").get("type") for name, case in found.items() if case.find("failure") is not None}
    assert kinds == {
        "audit: weights": "audit",
        "audit: layers": "audit",
        "prefill: perplexity_ratio": "missed",
        "decode: perplexity_ratio": "missed",
        "prefill: top1_agreement": "undecided",
        "decode: top1_agreement": "undecided",
    }
    said = found["audit: weights"].find("failure")
    for tensor in ("experts.3.down_proj", "dt_proj"):
        assert tensor in said.get("message") and tensor in said.text
    assert "expert 3" in found["audit: layers"].find("failure").text
    missed = found["decode: perplexity_ratio"].find("failure").get("message")
    assert "1.012" in missed and "at most 1.01" in missed


def test_undecided_is_skipped_where_that_passes():
    root = parsed(report_samples.report(), on_undecided="pass")
    assert_as_parsers_expect(root)
    case = cases(root, "onnx")["decode: top1_agreement"]
    assert "undecided" in case.find("skipped").get("message") and "12,000 more tokens" in case.find("skipped").text


def test_an_audit_that_holds_is_a_case_that_passes():
    sample = report_samples.report()
    sample["audit"] = [row for row in sample["audit"] if row["passed"]]
    assert list(cases(parsed(sample), "onnx")["audit: weights"]) == []


def test_without_limits_nothing_counts_as_tested():
    root = parsed(report_samples.without_findings(report_samples.report()))
    assert_as_parsers_expect(root)
    for artifact in ARTIFACTS:
        assert list(cases(root, artifact)) == ["not checked"]
        assert cases(root, artifact)["not checked"].find("skipped") is not None


@pytest.mark.parametrize("limit", [None, 1.01])
def test_a_figure_that_is_no_number_fails_with_and_without_a_limit(limit):
    row = report_samples.row("onnx", "decode", "perplexity_ratio")
    row |= {"value": None, "low": None, "high": None, "limit": limit, "passed": False if limit else None}
    sample = report_samples.without_findings(report_samples.report()) | {"checks": [row | {"outcome": None}]}
    failure = cases(parsed(sample), "onnx")["decode: perplexity_ratio"].find("failure")
    assert failure.get("type") == "not finite"


def test_a_limit_on_what_could_not_be_measured_is_skipped_and_says_why():
    row = report_samples.row("onnx", "decode", "top1_agreement")
    row |= {"value": None, "positions": 0, "passed": None, "outcome": None, "note": "no window is that long"}
    sample = report_samples.without_findings(report_samples.report()) | {"checks": [row]}
    assert cases(parsed(sample), "onnx")["decode: top1_agreement"].find("skipped").text == "no window is that long"


def test_what_must_not_be_worse_has_a_suite_of_its_own():
    root = parsed(report_samples.check(), changed={"change": report_samples.changed()})
    assert_as_parsers_expect(root)
    found = cases(root, "change")
    assert [name for name, case in found.items() if len(case)] == ["decode: perplexity"], "bytes are no accuracy"
    assert found["decode: perplexity"].find("failure").get("type") == "worse"


def test_names_may_hold_anything():
    sample = report_samples.report()
    for row in (*sample["audit"], *sample["layer_audit"], *sample["checks"]):
        row["artifact"] += HOSTILE + "\x00\ufffe"
    for row in sample["audit"]:
        row |= {"tensor": HOSTILE, "note": HOSTILE}
    text = junit.render(HOSTILE, sample, (), "fail")
    root = ET.fromstring(text.encode())
    assert_as_parsers_expect(root)
    assert "\u202e" not in text and "<script" not in text and "\\x1b[2J" in root[0].get("name")


def test_check_and_apply_write_it(compress_cli, small, applied, tmp_path):
    arguments = ("check", small, small, "--prompts", "self", "--samples", 4, "--length", 12)
    limits = ("--limit", "kl_divergence_mean=1", "--limit", "top1_agreement=0.5")
    result = compress_cli(*arguments, *limits, "--junit", tmp_path / "junit.xml")
    assert result.exit_code == 0, result.output
    root = ET.parse(tmp_path / "junit.xml").getroot()
    assert_as_parsers_expect(root)
    assert {"prefill: kl_divergence_mean", "decode: top1_agreement"} <= set(cases(root, "checkpoint"))
    written = ET.parse(applied / "junit.xml").getroot()
    assert_as_parsers_expect(written)
    assert [suite.get("name") for suite in written] == list(ARTIFACTS)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(compress_cli, tmp_path):
    result = compress_cli("check", "nowhere", "nowhere", "--junit", tmp_path / "no" / "junit.xml")
    assert result.exit_code == 2
    assert "--junit" in result.stderr
