"""README.md of a compressed checkpoint: front matter that the hub reads, how to load it, what was measured, and the card
of the model it was made from, quoted below."""

import re
from collections import Counter
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

import compress
from compress.check.compare import ALL
from compress.checkpoint import companions
from compress.formats import PLAIN
from compress.report import loading_snippets
from compress.report.schema import Report
from compress.report.words import is_shown, value_words, verdict_words
from compress.runtime.runtimes import RuntimeFacts
from compress.strict.json_text import JsonObject
from compress.terminal.escaping import code, code_block, markdown, printable

MODEL_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # as the hub has them
LICENCE_KEYS = (
    "license",
    "license_name",
    "license_link",
)  # of the original's front matter: they hold for this model too
EXPORTED = "The output of compress that this checkpoint is part of"
NEEDED = {"transformers": "pip install compressed-tensors"}  # to read what is quantized


def render(report: Report, formats: dict[str, str], source_folder: Path, recipe_text: str) -> str:
    """The card's text, from report.json and the format of every tensor by name."""
    original, metadata = _original(source_folder / companions.CARD)
    sections = [
        f"---\n{_front_matter(report, formats, metadata)}\n---",
        f"# {markdown(report['model']['name'])}, compressed",
        _summary(report, formats),
        "## Loading it",
        *_loading(report, formats),
        "## What was measured",
        _measured(report),
        "## How this model was compressed",
        f"The recipe, with every default written out:\n\n{code_block(recipe_text, 'yaml')}",
    ]
    if original:
        sections += ["## The original's card", "What it says, figures included, is of the original.", _quoted(original)]
    return "\n\n".join(sections) + "\n"


def _original(path: Path) -> tuple[str, JsonObject]:
    """The text of the original's card and the data in front of it; nothing where there is none that may travel."""
    if not path.is_file() or not companions.may_travel(path):
        return "", {}
    card = path.read_text(encoding="utf-8-sig", errors="replace")
    if not card.startswith("---"):
        return card.strip(), {}
    try:
        found = ModelCard(card, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError):  # front matter that is not YAML, or no mapping
        return card.strip(), {}
    data: JsonObject = found.data.to_dict()  # type: ignore[no-untyped-call]  # the hub has typed it in part
    return found.text.strip(), data


def _front_matter(report: Report, formats: dict[str, str], original: JsonObject) -> str:
    """The licence is the original's, where its card names one; the library is the one that loads it. A name that the hub has
    none of is left out."""
    name = report["model"]["name"]
    takes_stock = any(row["name"] == "transformers" and row["loads"] for row in report["runtimes"])
    library = "transformers" if takes_stock else "compress"
    data = ModelCardData(
        base_model=name if MODEL_NAME.fullmatch(name) else None,
        library_name=library,
        tags=["compress", report["model"]["model_type"], *sorted(set(formats.values()))],
    )
    for key in LICENCE_KEYS:
        if original.get(key):
            setattr(data, key, original[key])
    return data.to_yaml().strip()


def _summary(report: Report, formats: dict[str, str]) -> str:
    artifact = report["artifacts"][0]
    stored = ", ".join(f"{number} tensors as {name}" for name, number in sorted(Counter(formats.values()).items()))
    return " ".join(
        (
            f"Made from {code(report['model']['name'])} by compress {compress.__version__}: {stored}.",
            f"Weights take {artifact['weight_bytes']:,} bytes, {artifact['bits_per_weight']:.2f} bits for each parameter "
            f"of the original, whose files have {report['size']['baseline_bytes']:,}.",
            *map(markdown, artifact.get("notes", [])),
        )
    )


def _loading(report: Report, formats: dict[str, str]) -> list[str]:
    """A paragraph for each runtime of the checkpoint, then for each runtime of the exports of the same output."""
    is_quantized = any(name not in PLAIN for name in formats.values())
    found = []
    for artifact in report["artifacts"]:
        rows = [row for row in report["runtimes"] if row["artifact"] == artifact["kind"]]
        if artifact is report["artifacts"][0]:
            found.append("`folder` is the one this file lies in.")
        elif rows:
            found.append(f"{EXPORTED} has {code(artifact['path'])} too; `output` is its folder.")
        found += [_loading_with(row, artifact["path"], is_quantized) for row in rows]
    return found


def _loading_with(row: RuntimeFacts, path: str, is_quantized: bool) -> str:
    if not row["loads"]:
        return f"{row['name']} does not load it: {row['why']}."
    title = f"{row['name']} {row['minimum']}" if row["minimum"] else row["name"]
    needed = f", after {code(NEEDED[row['name']])}" if is_quantized and row["name"] in NEEDED else ""
    language, snippet = loading_snippets.of(row["name"], path)
    return f"With {title}{needed}:\n\n{code_block(snippet, language)}"


def _measured(report: Report) -> str:
    rows = [row for row in report["checks"] if row["prompts"] == ALL and is_shown(row)]
    if not rows:
        return "Nothing: no check was asked for."
    sets = ", ".join(f"{markdown(used['name'])} ({used['tokens']:,} tokens)" for used in report["prompts"])
    lines = [
        f"| {row['artifact']} | {row['phase']} | {row['metric']} | {value_words(row)} | "
        f"{'' if row['limit'] is None else format(row['limit'], 'g')} |"
        for row in rows
    ]
    head = ("| file | phase | metric | value | limit |", "|---|---|---|---|---|")
    return f"Against the original, on {sets}. Verdict: {verdict_words(report['verdict'], report)}.\n\n" + "\n".join(
        (*head, *lines)
    )


def _quoted(card: str) -> str:
    return "\n".join(f"> {printable(line)}".rstrip() for line in card.splitlines())
