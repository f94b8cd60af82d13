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
from compress.escaping import code, code_block, markdown, printable
from compress.report.terminal import value_words, verdict_words

MODEL_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)  # as the hub has them
LICENCE_KEYS = (
    "license",
    "license_name",
    "license_link",
)  # of the original's front matter: they hold for this model too
LOADING = {  # how runtimes of the report's `runtimes` take the folder the card lies in
    "transformers": (
        "import torch\nfrom transformers import AutoModelForCausalLM\n\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)"
    ),
    "compress.load": "import compress\n\nmodel = compress.load(folder)",
}


def render(report: dict, formats: dict[str, str], source_folder: Path, recipe_text: str) -> str:
    """The card's text, from report.json and the format of every tensor by name."""
    original, metadata = _original(source_folder / companions.CARD)
    sections = [
        f"---\n{_front_matter(report, formats, metadata)}\n---",
        f"# {markdown(report['model']['name'])}, compressed",
        _summary(report, formats),
        "## Loading it",
        *_loading(report),
        "## What was measured",
        _measured(report),
        "## How this model was compressed",
        f"The recipe, with every default written out:\n\n{code_block(recipe_text, 'yaml')}",
    ]
    if original:
        sections += ["## The original's card", "What it says, figures included, is of the original.", _quoted(original)]
    return "\n\n".join(sections) + "\n"


def _original(path: Path) -> tuple[str, dict]:
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
    return found.text.strip(), found.data.to_dict()


def _front_matter(report: dict, formats: dict[str, str], original: dict) -> str:
    """The licence is the original's, where its card names one. A name that the hub has none of is left out."""
    name = report["model"]["name"]
    return (
        ModelCardData(
            base_model=name if MODEL_NAME.fullmatch(name) else None,
            library_name="transformers",
            tags=["compress", report["model"]["model_type"], *sorted(set(formats.values()))],
            **{key: original[key] for key in LICENCE_KEYS if original.get(key)},
        )
        .to_yaml()
        .strip()
    )


def _summary(report: dict, formats: dict[str, str]) -> str:
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


def _loading(report: dict) -> list[str]:
    """A paragraph for each runtime of the checkpoint, and a line on the exports beside it."""
    found = ["`folder` is the one this file lies in."]
    for row in report["runtimes"]:
        title = f"{row['name']} {row['minimum']}" if row["minimum"] else row["name"]
        if row["artifact"] != report["artifacts"][0]["kind"]:
            continue
        if row["loads"]:
            found.append(f"With {title}:\n\n{code_block(LOADING[row['name']], 'python')}")
        else:
            found.append(f"{row['name']} does not load it: {row['why']}.")
    return found


def _measured(report: dict) -> str:
    rows = [row for row in report["checks"] if row["prompts"] == ALL]
    if not rows:
        return "Nothing: no check was asked for."
    sets = ", ".join(f"{markdown(used['name'])} ({used['tokens']:,} tokens)" for used in report["prompts"])
    lines = [
        f"| {row['artifact']} | {row['phase']} | {row['metric']} | {value_words(row)} | "
        f"{'' if row['limit'] is None else format(row['limit'], 'g')} |"
        for row in rows
    ]
    head = ("| file | phase | metric | value | limit |", "|---|---|---|---|---|")
    return f"Against the original, on {sets}. Verdict: {verdict_words(report)}.\n\n" + "\n".join((*head, *lines))


def _quoted(card: str) -> str:
    return "\n".join(f"> {printable(line)}".rstrip() for line in card.splitlines())
