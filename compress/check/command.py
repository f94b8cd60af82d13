"""`compress check`: settings from flags, one comparison, rows to the terminal."""

from pathlib import Path

from rich.console import Console

from compress import prompts, source, strict_yaml
from compress.artifacts import find_artifact, open_artifact
from compress.check import run as check_run
from compress.check.compare import verdict
from compress.check.settings import Check
from compress.errors import InputError
from compress.paths import printable
from compress.report import terminal
from compress.report.manifest import versions
from compress.strict_model import from_flags


def settings(
    prompts: tuple[str, ...], limits: tuple[str, ...], limits_file: Path | None, samples: int, length: int
) -> Check:
    """Flags to validated settings; a --limit overrides the same metric in the --limits file."""
    values = _file_limits(limits_file) | dict(_limit(text) for text in limits)
    return from_flags(Check, prompts=prompts or ("heldout",), samples=samples, length=length, limits=values)


def _limit(text: str) -> tuple[str, float]:
    metric, _, value = text.partition("=")
    try:
        return metric, float(value)
    except ValueError:
        raise InputError(f"--limit {text}: expected METRIC=VALUE, such as kl_divergence_mean=0.01") from None


def _file_limits(path: Path | None) -> dict:
    if path is None:
        return {}
    values = strict_yaml.load(path).data
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a mapping of METRIC: VALUE")
    return values


def check(baseline: str, candidate: Path, checks: Check, *, seed: int, device: str) -> dict:
    """Compares the two and shows the rows on stderr; returns what `--json` writes."""
    path = find_artifact(candidate)
    original = open_artifact(_baseline_path(baseline), device)
    for name in checks.prompts:
        prompts.refuse_unusable(name, original.folder, length=checks.length)
    rows, used = check_run.run(original, {_kind(path): path}, checks, seed=seed, device=device)
    result = {
        "schema": 1,
        "verdict": verdict(rows),
        "baseline": {"name": printable(baseline), "sha256": original.sha256()},
        "candidate": printable(str(candidate)),
        "prompts": used,
        "checks": [row.to_json() for row in rows],
        "versions": versions(),
    }
    console = Console(stderr=True, highlight=False, markup=False)
    terminal.show_rows(result["checks"], console)
    console.print(f"verdict: {result['verdict']}")
    return result


def _baseline_path(name: str) -> Path:
    """A local artifact, or a model by name."""
    return find_artifact(Path(name)) if Path(name).exists() else source.resolve(name).folder


def _kind(path: Path) -> str:
    return printable(path.resolve().parent.name) if path.suffix == ".onnx" else "checkpoint"
