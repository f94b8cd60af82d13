"""Which runtimes take what a recipe writes, told from formats before any work: what report.json has under `runtimes`.

A minimum is the oldest version that ran: every graph of every format at prefill and decode (tests/compilers), every
mixture of formats (tests/test_load.py). Older ones were not tried, or failed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

from compress.checkpoint.compressed_tensors import Scheme, is_integer
from compress.model.hybrid import HybridModel
from compress.model.roles import Role
from compress.model.states import StateKind
from compress.model.weight import Weight
from compress.recipe.recipe import ExportStep
from compress.runtime.state_support import why_not_genai, why_not_transformers_js

OPENVINO, GENAI, TRANSFORMERS_JS, TRANSFORMERS = "2026.4", "0.18", "4.3", "5.23"
TENSORRT_RTX = "1.7"
ONNXRUNTIME = "1.19"
INT4_TABLE = "1.23"  # the first that casts to int4, as an int4 embedding is when it is the output matrix too
IGNORES_STATES = "its cache does not round states"
NARROW_STATES = "1.20"  # the first whose Python interface hands over bf16 and fp8
BUILT = "its builder takes the graph; no engine has been executed"
BLOCKS = "it wants inputs that blocks of 128 divide"
SIDE_BY_SIDE = "it has no word for a layer with a key-value cache and Mamba states side by side"
SAME_SCALES = {"int8-tensor": "int8", "fp8-e4m3-tensor": "fp8-e4m3"}  # transformers reads either for the other


class RuntimeFacts(TypedDict):
    """The same as JSON has it."""

    artifact: str
    name: str
    minimum: str | None
    loads: bool
    why: str | None


@dataclass(frozen=True)
class Runtime:
    """Whether a runtime takes an artifact, from which version on, and in a sentence why not, or what it leaves out."""

    artifact: str
    name: str
    minimum: str | None = None
    loads: bool = True
    why: str | None = None

    def to_json(self) -> RuntimeFacts:
        return {
            "artifact": self.artifact,
            "name": self.name,
            "minimum": self.minimum,
            "loads": self.loads,
            "why": self.why,
        }

    @property
    def title(self) -> str:
        named = self.name if self.minimum is None else f"{self.name} {self.minimum}"
        return f"{named} ({self.why})" if self.loads and self.why else named


def of(model: HybridModel, exports: Iterable[ExportStep]) -> list[Runtime]:
    """For a model as it will be stored, and the exports of a recipe. An exporter that says nothing has no rows."""
    return of_checkpoint(model) + [runtime for step in exports for runtime in step.bound().runtimes(model)]


def as_lines(found: list[Runtime]) -> list[str]:
    """One for each artifact, such as `onnx: onnxruntime 1.19, openvino 2026.4; not transformers.js: WHY`."""
    lines = []
    for artifact in dict.fromkeys(runtime.artifact for runtime in found):
        rows = [runtime for runtime in found if runtime.artifact == artifact]
        taken = ", ".join(runtime.title for runtime in rows if runtime.loads)
        refused = "".join(f"; not {runtime.name}: {runtime.why}" for runtime in rows if not runtime.loads)
        lines.append(f"{artifact}: {taken}{refused}")
    return lines


def of_checkpoint(model: HybridModel) -> list[Runtime]:
    why = why_not_stock(model)
    said = IGNORES_STATES if why is None and model.config.compress.states else why
    stock = Runtime("checkpoint", "transformers", TRANSFORMERS, why is None, said)
    return [stock, Runtime("checkpoint", "compress.load")]


def why_not_stock(model: HybridModel) -> str | None:
    """What stops transformers without this package, or None. It knows one number of experts for all layers, and while it
    dequantizes two schemes at most, one for the experts and one for all else."""
    quantized = [weight for weight in model.weights if weight.is_quantized]
    experts = [weight for weight in model.weights if weight.role == Role.EXPERTS]
    reasons = (
        (_experts_differ(model), "layers have different numbers of experts, or routers rows of removed ones"),
        (any(w.rotation for w in quantized), "matrices are stored rotated"),
        (any(w.activation and _is_integer(w) for w in quantized), "it has no int8 matrices beside rounded inputs"),
        (len(_schemes(w for w in experts if w.is_quantized)) > 1, "experts have more than one format"),
        (_are_partly_integers(experts), "some experts are quantized to integers and some are not"),
        (len(_schemes(w for w in quantized if w.role != Role.EXPERTS)) > 1, "matrices other than experts have more than one format"),
        (any(map(_has_several_blocks, experts)), "experts have scales in more than one block of 128x128"),
    )  # fmt: skip
    return next((why for holds, why in reasons if holds), None)


def _experts_differ(model: HybridModel) -> bool:
    whole = model.config.total_experts
    sizes = {(layer.experts.count, layer.experts.router.rows) for layer in model.layers if layer.experts}
    return any(size != (whole, whole) for size in sizes)


def _is_integer(weight: Weight) -> bool:
    return is_integer(weight.format)


def _are_partly_integers(experts: list[Weight]) -> bool:
    return any(map(_is_integer, experts)) and not all(weight.is_quantized for weight in experts)


def _schemes(weights: Iterable[Weight]) -> set[tuple[str, str | None]]:
    """The schemes transformers would have to tell apart; inputs of fp8 matrices stay as they are there."""
    found = set()
    for scheme in map(Scheme.of, weights):
        is_fp8 = scheme.format.startswith("fp8")
        found.add((SAME_SCALES.get(scheme.format, scheme.format), None if is_fp8 else scheme.activation))
    return found


def _has_several_blocks(weight: Weight) -> bool:
    return weight.format == "fp8-e4m3-b128" and max(weight.shape) > 128


def of_onnx(model: HybridModel, artifact: str, layout: str) -> list[Runtime]:
    """The portable graph."""
    weights = list(model.weights)
    why = BLOCKS if any(map(_ends_in_a_block, weights)) else None
    return [
        Runtime(artifact, "onnxruntime", _least_onnxruntime(model)),
        _of_layout(model, artifact, layout),
        Runtime(artifact, "openvino", OPENVINO, why is None, why),
    ]


def of_tensorrt(artifact: str) -> list[Runtime]:
    """The strongly typed graph, of any model that its exporter does not refuse."""
    return [Runtime(artifact, "tensorrt-rtx", TENSORRT_RTX, why=BUILT)]


def _least_onnxruntime(model: HybridModel) -> str:
    if any(weight.role == Role.EMBEDDING and weight.format.startswith("int4") for weight in model.weights):
        return INT4_TABLE
    formats = {spec.precision.format for layer in model.layers for spec in layer.carried}
    return NARROW_STATES if formats & {"bf16", "fp8-e4m3"} else ONNXRUNTIME


def _of_layout(model: HybridModel, artifact: str, layout: str) -> Runtime:
    if layout == "genai":
        why = why_not_genai(model.layers)
        return Runtime(artifact, "onnxruntime-genai", GENAI, why is None, why)
    kinds = [{spec.kind for spec in layer.states} for layer in model.layers]
    is_mixed = any(StateKind.KV in one and len(one) > 1 for one in kinds)
    why = why_not_transformers_js(model.layers) or (SIDE_BY_SIDE if is_mixed else None)
    return Runtime(artifact, "transformers.js", TRANSFORMERS_JS, why is None, why)


def _ends_in_a_block(weight: Weight) -> bool:
    return weight.format == "fp8-e4m3-b128" and weight.shape[1] % 128 != 0 and weight.role != Role.EMBEDDING
