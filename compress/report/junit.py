"""junit.xml: what CI systems list as tests. A suite for each artifact; in it a case for each limit, and one for each audit.

Times are 0: what a single figure took is not known, and readers want the attribute.
"""

import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeVar

from compress.check.audit import AuditFacts
from compress.check.changes import ChangeFacts
from compress.check.compare import ALL, FoundFacts, RowFacts
from compress.check.layer_audit import LayerAuditFacts
from compress.report import changes, overview
from compress.report.words import block_words, is_unmeasured
from compress.terminal.escaping import printable

OnUndecided = Literal["fail", "pass"]
NAMED = 3  # of what an audit found, in the message; the text has all
Audited = TypeVar("Audited", AuditFacts, LayerAuditFacts)


class Case(NamedTuple):
    """`kind` says why it is not passed; `skipped` is for what nobody can tell."""

    name: str
    kind: str | None = None
    message: str = ""
    text: str = ""

    @property
    def is_skipped(self) -> bool:
        return self.kind == "skipped"


def render(
    name: str, found: FoundFacts, artifacts: Sequence[str], on_undecided: OnUndecided = "fail",
    changed: Mapping[str, Sequence[ChangeFacts]] = MappingProxyType({}),
) -> str:  # fmt: skip
    """Of all `artifacts`, and whatever else something was found of. `name` is that of the whole. `changed`, by name, is what
    must not be worse than before."""
    suites = {artifact: _cases(found, artifact, on_undecided) for artifact in (*artifacts, *overview.artifacts(found))}
    suites |= {suite: [_change(row) for row in rows if row["phase"]] for suite, rows in changed.items()}
    root = ET.Element(
        "testsuites", {"name": printable(name)} | _counts([c for cases in suites.values() for c in cases])
    )
    for artifact, cases in suites.items():
        suite = ET.SubElement(root, "testsuite", {"name": printable(artifact)} | _counts(cases))
        for case in cases:
            suite.append(_element(artifact, case))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _counts(cases: Sequence[Case]) -> dict[str, str]:
    skipped = sum(case.is_skipped for case in cases)
    failures = sum(case.kind is not None for case in cases) - skipped
    return {"tests": str(len(cases)), "failures": str(failures), "errors": "0", "skipped": str(skipped), "time": "0"}


def _element(artifact: str, case: Case) -> ET.Element:
    element = ET.Element("testcase", {"classname": f"compress.{printable(artifact)}", "name": case.name, "time": "0"})
    if case.kind is not None:
        attributes = {"message": printable(case.message)} | ({} if case.is_skipped else {"type": case.kind})
        outcome = ET.SubElement(element, "skipped" if case.is_skipped else "failure", attributes)
        outcome.text = printable(case.text or case.message, keep="\n")  # which is all that GitLab shows
    return element


def _cases(found: FoundFacts, artifact: str, on_undecided: OnUndecided) -> list[Case]:
    tensors = [row for row in found["audit"] if row["artifact"] == artifact]
    blocks = [row for row in found["layer_audit"] if row["artifact"] == artifact]
    rows = [row for row in found["checks"] if row["artifact"] == artifact and row["prompts"] == ALL]
    return [
        *_audited("audit: weights", tensors, lambda row: row["tensor"]),
        *_audited("audit: layers", blocks, block_words),
        *(list(_limits(rows, on_undecided)) or [Case("not checked", "skipped", "no limit was set")]),
    ]


def _change(row: ChangeFacts) -> Case:
    name = f"{row['phase']}: {row['metric']}"
    return Case(name, "worse", changes.words(row)) if row["outcome"] == "worse" else Case(name)


def _audited(name: str, rows: Sequence[Audited], subject: Callable[[Audited], str]) -> Iterator[Case]:
    failed = [f"{subject(row)}: {overview.audit_words(row)}" for row in rows if not row["passed"]]
    if failed:
        more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        message = f"{len(failed)} of {len(rows)} fail: {'; '.join(failed[:NAMED])}{more}"
        yield Case(name, "audit", message, "\n".join(map(printable, failed)))
    elif rows:
        yield Case(name)


def _limits(rows: Sequence[RowFacts], on_undecided: OnUndecided) -> Iterator[Case]:
    """A case for each row with a limit, and for each that is no number."""
    for row in rows:
        name, words = f"{row['phase']}: {row['metric']}", overview.row_words(row)
        if overview.is_not_finite(row):
            yield Case(name, "not finite", words)
        elif row["limit"] is not None and is_unmeasured(row):
            yield Case(name, "skipped", row.get("note", words))
        elif (outcome := row["outcome"]) == "undecided" and on_undecided == "pass":
            yield Case(name, "skipped", f"undecided: {words}")
        elif outcome is not None:
            yield Case(name) if outcome == "held" else Case(name, outcome, words)
