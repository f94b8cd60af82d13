"""What is wrong with an engine, as rows of the audit: its layers that the builder widened."""

from collections.abc import Iterator

from compress.check.audit import AuditFacts
from compress.check.compare import Found
from compress.output_folder import build_facts
from compress.output_folder.build_facts import BuildFacts


def add(found: Found, artifact: str, facts: BuildFacts) -> None:
    """To what the check of the graph found: what was built of it, and what was widened in that."""
    found.audit += _audit(artifact, facts)
    found.remarks.append(f"{artifact}: {build_facts.sentence(facts)}")


def _audit(artifact: str, facts: BuildFacts) -> Iterator[AuditFacts]:
    """One for each tensor that was to be quantized and is not. The rest of the audit is of the graph."""
    for layer in facts["layers"]:
        if (name := layer["tensor"]) in facts["widened"]:
            yield {
                "artifact": artifact, "tensor": name, "format": layer["format"], "relative_error": None,
                "expected_at_most": None, "passed": False, "note": widened_words(name, facts),
            }  # fmt: skip


def widened_words(name: str, facts: BuildFacts) -> str:
    """How it shows that a layer was widened."""
    layer = next(layer for layer in facts["layers"] if layer["tensor"] == name)
    meant, held = layer["format"], layer["precision"]
    if held is None or not meant.startswith(held):
        return f"widened in the engine: meant to be {meant}, {held or 'not found'} according to the {layer['source']}"
    size, most = facts["engine_weight_bytes"], facts["expected_weight_bytes"]
    return f"widened in the engine: meant to be {meant}, but the engine's weights take {size:,} bytes where {most:,} were expected"
