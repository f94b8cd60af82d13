"""Both audits of one artifact: tensor by tensor, then layer by layer where there is all of every layer."""

from collections.abc import Iterator

from compress import parallel
from compress.check import audit, layer_audit
from compress.check.audit import AuditFacts, Models
from compress.check.compare import Found
from compress.check.layer_audit import LayerAuditFacts
from compress.model import replay
from compress.runtime.artifacts import Artifact
from compress.terminal import progress


def audited(name: str, original: Artifact, artifact: Artifact, seed: int, device: str) -> Found:
    """An audit holds an artifact against what it was made from: a remark says so where the baseline is no such thing."""
    if not replay.came_from(original.config.compress.passes, artifact.config.compress.passes):
        return Found(
            remarks=[f"{name}: not audited, since the baseline is an artifact itself that this one was not made from"]
        )
    models = Models(original.model(), artifact.model())
    found = Found(audit=_of_weights(name, models), remarks=list(_untold(name, models)))
    if all(row["passed"] or row["relative_error"] is not None for row in found.audit):
        found.layer_audit = _of_layers(name, models, original, seed, device)
    return found


def _untold(name: str, models: Models) -> Iterator[str]:
    if not models.done and any(weight.is_quantized for weight in models.candidate.weights):
        yield f"{name}: its config.json does not say what was done to it; quantized tensors are held to the bounds of GPTQ"


def _of_weights(name: str, models: Models) -> list[AuditFacts]:
    with progress.task(audit.stage(name), models.candidate.parameters) as advance, parallel.steady():
        return list(audit.audit(name, models, advance))


def _of_layers(name: str, models: Models, original: Artifact, seed: int, device: str) -> list[LayerAuditFacts]:
    ids = layer_audit.tokens(original, seed)
    with progress.task(layer_audit.stage(name), original.config.num_hidden_layers) as advance, parallel.steady():
        return list(layer_audit.audit(name, models, ids, device, advance))
