"""What a check keeps for later ones, and what it says of an earlier result or of a baseline that is an older artifact."""

from compress.check import earlier, old
from compress.check.changes import between
from compress.check.compare import Found, Verdict, verdict
from compress.check.earlier import Earlier, Ground, Now
from compress.check.standing import Standing
from compress.errors import InputError
from compress.output_folder.manifest import versions
from compress.recipe.check import Check
from compress.report import changes
from compress.report.schema import AcrossFacts
from compress.runtime.artifacts import Artifact
from compress.studies import results
from compress.studies.check_options import Flags


class Across:
    """One check among others. What is wrong with its options or files is refused when it is made, or when it begins."""

    def __init__(self, flags: Flags):
        self._target, self._path, self._fails = flags["save_result"], flags["against_result"], flags["fail_if_worse"]
        if self._target is not None:
            results.refuse_unwritable_file("--save-result", str(self._target))
        self._earlier: Earlier | None = None if self._path is None else earlier.read(self._path)

    def begin(self, original: Artifact, checks: Check, seed: int) -> "Begun":
        is_old = old.is_artifact(original)
        if self._fails and self._earlier is None and not is_old:
            raise InputError(
                "--fail-if-worse compares with a result, which --against-result names, or with a BASELINE that is itself an "
                "artifact; here is neither"
            )
        ground = earlier.expected(original.sha256(), checks, seed)
        if self._earlier is not None and self._path is not None:
            earlier.refuse_other_settings(self._path, self._earlier, ground)
        return Begun(ground, original.weight_bytes, is_old)

    def compare(self, begun: "Begun", candidate: str, found: Found, weight_bytes: int) -> tuple[AcrossFacts, Now]:
        """What changed, and what is kept of this check."""
        after = _standing(found, weight_bytes, of_baseline=False)
        now = Now(candidate, earlier.measured(begun.ground, after), after)
        facts: AcrossFacts = {}
        if begun.is_old:
            facts["change"] = between(_standing(found, begun.old_bytes, of_baseline=True), after)
        if self._earlier is not None and self._path is not None:
            facts["against_result"] = earlier.against(self._path, self._earlier, now)
        return facts, now

    def verdict(self, found: Found, facts: AcrossFacts) -> Verdict:
        """Where what is worse is to fail, finding nothing worse is a check, too."""
        decided = verdict(found)
        if not self._fails:
            return decided
        if changes.worse(facts):
            return "fail"
        return decided if any(row.limit is not None for row in found.rows) or decided == "fail" else "pass"

    def because(self, facts: AcrossFacts) -> str:
        """What a verdict fails for beside its limits, or how much was left open where nothing is worse; empty where that does
        not matter."""
        if not self._fails:
            return ""
        if found := [f"{row['metric']} ({row['phase']})" for row in changes.worse(facts)]:
            return f"; worse than before: {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
        rows = [row for of in changes.by_name(facts).values() for row in of if row["phase"]]
        left_open = sum(row["outcome"] == "undecided" for row in rows)
        return f"; nothing is worse than before, {left_open} of {len(rows)} figures undecided"

    def save(self, now: Now) -> None:
        if self._target is not None:
            results.put_text(earlier.as_text(now, versions()), str(self._target))


class Begun:
    """What is known of the other side once the baseline is open."""

    def __init__(self, ground: Ground, old_bytes: int, is_old: bool):
        self.ground, self.old_bytes, self.is_old = ground, old_bytes, is_old


def _standing(found: Found, weight_bytes: int, *, of_baseline: bool) -> Standing:
    """Of the candidate, or of the baseline."""
    text = tuple(one for one in found.text if (one.artifact is None) == of_baseline)
    tasks = tuple(one for one in found.answered if (one.artifact is None) == of_baseline)
    return Standing(text=text, tasks=tasks, weight_bytes=weight_bytes)
