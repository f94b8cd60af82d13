"""A report in which something stands in every part, and much is wrong; figures are made up."""

import copy

from compress.recipe.check import METRICS

HOSTILE = "a\x1b[2Jb\nc|d`e<script>alert(1)</script>[h](i)&amp;\u202el"
PHASES = ("prefill", "decode")
VALUES = {"perplexity_ratio": 1.012, "kl_divergence_mean": 0.0031, "kl_divergence_p99": 0.026, "top1_agreement": 0.958}
LIMITS = {"perplexity_ratio": 1.01, "kl_divergence_mean": 0.006, "top1_agreement": 0.955}
OUTCOMES = {"perplexity_ratio": "missed", "kl_divergence_mean": "held", "top1_agreement": "undecided"}


def report() -> dict:
    """The verdict is `fail`: two tensors, a block, a limit of each artifact and phase; another is undecided."""
    return {
        "schema": 1,
        "verdict": "fail",
        "model": {"name": "tiny", "revision": None, "weights_sha256": "0" * 64, "model_type": "jamba",
                  "parameters": 7_381_532, "active_parameters": 3_695_132},
        "size": {"baseline_bytes": 14_787_176, "baseline_float32_bytes": 29_526_128, "candidate_bytes": 5_365_904,
                 "bits_per_weight": 5.82, "candidate_parameters": 7_381_532},
        "passes": passes(),
        "calibration": {"tokens": 1024, "prompts": ["prose"], "windows": 8,
                        "expert_coverage": {"min_tokens": 6, "experts_below_threshold": ["layer 1 expert 3"],
                                            "below_threshold": "saw fewer tokens than 128"}},
        "artifacts": [artifact("checkpoint", "checkpoint", 6.24), artifact("onnx", "onnx/model.onnx", 5.82)],
        "runtimes": [{"artifact": "onnx", "name": "onnxruntime", "minimum": "1.19", "loads": True, "why": None}],
        "states": [{"layer": 0, "kind": "ssm_state", "format": "int8", "rounding": "stochastic", "every": 1,
                    "scale": "dynamic", "bytes_per_sequence": 8320}],
        "state_memory": {"baseline": memory(4), "candidate": memory(1)},
        "prompts": [{"name": "heldout", "windows": 24, "tokens": 12_288}],
        **found(),
        "versions": {"compress": "0.1.0", "python": "3.11.2", "torch": "2.9.0"},
    }  # fmt: skip


def check() -> dict:
    """What `check --json` would have of the same."""
    return {"schema": 1, "verdict": "fail", "baseline": {"name": "models/tiny", "sha256": "0" * 64},
            "candidate": "out/tiny", "prompts": [{"name": "heldout", "windows": 24, "tokens": 12_288}], **found(),
            "versions": {"compress": "0.1.0"}}  # fmt: skip


def changed() -> list[dict]:
    """As a check of two artifacts has it: one figure is worse."""
    rows = [("perplexity", "decode", 30.0, 31.0, 1.0, 0.5, 1.5, "worse"),
            ("top1_agreement", "decode", 0.95, 0.96, 0.01, 0.001, 0.02, "better"),
            ("kl_divergence_mean", "decode", 0.003, 0.0031, 0.0001, -0.001, 0.001, "undecided"),
            ("weight_bytes", None, 7_000_000, 5_365_904, -1_634_096, None, None, "better")]  # fmt: skip
    names = ("metric", "phase", "old", "new", "difference", "low", "high", "outcome")
    return [dict(zip(names, row, strict=True)) for row in rows]


def against() -> dict:
    return {"file": "last.json", "candidate": "out/old", "versions": {}, "changes": changed()}


def without_findings(sample: dict) -> dict:
    """The same report of a run that checked nothing."""
    return copy.deepcopy(sample) | {"verdict": "not_checked", "prompts": []} | {key: [] for key in found()}


def found() -> dict:
    return {
        "remarks": ["the candidate is better than the baseline by more than chance explains"],
        "checks": [row(artifact, phase, metric, prompts) for artifact in ("checkpoint", "onnx") for phase in PHASES
                   for prompts in ("all", "heldout") for metric in VALUES],
        "audit": audit(),
        "layer_audit": [block("onnx", layer, name, expert) for layer, name, expert in
                        ((0, "mamba", None), (1, "moe", 3), (4, "attention", None))],
        "flips": [{"artifact": artifact, "phase": phase, "prompts": "all", "positions": 2552, "both_right": 1200,
                   "only_baseline": 40, "only_candidate": 12, "neither": 1300, "p_value": 0.00012}
                  for artifact in ("checkpoint", "onnx") for phase in PHASES],
        "worst_prompts": [worst("onnx", window) for window in (3, 7)],
        "tasks": [{"artifact": "onnx", "task": "facts", "kind": "multiple_choice", "items": 200,
                   "baseline_accuracy": 0.81, "candidate_accuracy": 0.785, "change": -0.025, "low": -0.05, "high": 0.0,
                   "only_baseline": 9, "only_candidate": 4, "p_value": 0.27}],
        "by_position": [position(artifact, phase, *bucket) for artifact in ("checkpoint", "onnx") for phase in PHASES
                        for bucket in ((0, 63), (64, 255), (256, 511))],
        "recall": [{"artifact": artifact, "phase": "decode", "first": first, "last": first, "trials": 400,
                    "baseline_accuracy": 0.9, "candidate_accuracy": 0.9 - first / 1000, "drop": first / 1000,
                    "low": 0.0, "high": first / 400} for artifact in ("checkpoint", "onnx") for first in (16, 64, 128)],
        "state_health": [{"artifact": "onnx", "layer": 0, "kind": "ssm_state", "position": place, "rms": 0.51,
                          "baseline_rms": 0.5, "ratio": 1.02} for place in (63, 255)],
        "state_saturation": [{"artifact": "onnx", "layer": 0, "kind": "ssm_state", "format": "int8", "entries": 100,
                              "saturated": 1, "share": 0.01}],
        "generated": [{"artifact": "onnx", "figure": "length", "texts": 4, "baseline": 24.0, "candidate": 22.0,
                       "value": -2.0, "low": -4.0, "high": 1.0}],
    }  # fmt: skip


def row(artifact: str, phase: str, metric: str, prompts: str = "all") -> dict:
    value, limit = VALUES[metric], LIMITS.get(metric) if prompts == "all" else None
    outcome = OUTCOMES[metric] if limit is not None else None
    return {"artifact": artifact, "metric": metric, "phase": phase, "prompts": prompts, "value": value,
            "low": value * 0.99, "high": value * 1.01, "positions": 2552, "limit": limit,
            "passed": None if limit is None else outcome == "held", "outcome": outcome,
            "more_tokens": 12_000 if outcome == "undecided" else None}  # fmt: skip


def audit() -> list[dict]:
    tensors = [(f"model.layers.{layer}.mamba.{name}.weight", "int8", 0.007, 0.0098)
               for layer in range(4) for name in ("in_proj", "out_proj")]  # fmt: skip
    tensors += [("model.layers.1.feed_forward.experts.3.down_proj.weight", "int4-g32", 1.0, 0.24)]
    tensors += [("model.layers.3.mamba.dt_proj.weight", "bf16", 0.21, 0.0)]
    return [{"artifact": "onnx", "tensor": tensor, "format": stored, "relative_error": error, "expected_at_most": most,
             "passed": error <= most} for tensor, stored, error, most in tensors]  # fmt: skip


def block(artifact: str, layer: int, name: str, expert: int | None) -> dict:
    error = 0.4 if expert is not None else 0.0004
    return {"artifact": artifact, "layer": layer, "block": name, "expert": expert, "matrix": None, "tokens": 512,
            "relative_error": error, "expected_at_most": 0.001, "passed": error <= 0.001}  # fmt: skip


def worst(artifact: str, window: int) -> dict:
    return {"artifact": artifact, "phase": "decode", "prompts": "heldout", "window": window,
            "kl_divergence_mean": 0.02, "perplexity_ratio": 1.09, "text": "The fox went to the river,\nand there",
            "baseline_text": " it met a bear.", "candidate_text": " it it it <b>it</b>"}  # fmt: skip


def position(artifact: str, phase: str, first: int, last: int) -> dict:
    value = 0.003 + first * 1e-6
    return {"artifact": artifact, "phase": phase, "first": first, "last": last, "positions": 500,
            "kl_divergence_mean": value, "low": value * 0.8, "high": value * 1.2, "baseline_perplexity": 30.0,
            "candidate_perplexity": 30.2}  # fmt: skip


def artifact(kind: str, path: str, bits: float) -> dict:
    weights = int(7_381_532 * bits / 8)
    return {"kind": kind, "path": path, "bytes": weights + 100_000, "graph_bytes": 100_000, "weight_bytes": weights,
            "bits_per_weight": bits, "notes": ["3 tensors travel as they came"]}  # fmt: skip


def memory(bytes_each: int) -> dict:
    kinds = {"ssm_state": (30_720 * bytes_each, 0), "conv_state": (11_520, 0), "kv_cache": (0, 64 * bytes_each)}
    kinds["total"] = tuple(map(sum, zip(*kinds.values(), strict=True)))
    return {kind: {"bytes_per_sequence": fixed, "bytes_per_token": each,
                   "at": {str(n): fixed + n * each for n in (4096, 32_768, 262_144)}}
            for kind, (fixed, each) in kinds.items()}  # fmt: skip


def passes() -> list[dict]:
    layers = [{"layer": layer, "experts": 4, "kept": [0, 1, 3], "tokens": [400, 300, 20, 304], "dead": []}
              for layer in (1, 3)]  # fmt: skip
    return [{"name": "prune_experts", "seconds": 2.5, "peak_rss_bytes": 300 << 20, "details": {"layers": layers}},
            {"name": "quantize", "seconds": 12.5, "peak_rss_bytes": 400 << 20, "details": {"method": "gptq"}}]  # fmt: skip


assert set(VALUES) <= set(METRICS)
