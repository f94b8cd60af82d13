"""Mean KL of artifacts against the original, beside llama.cpp's figures: `python benchmarks/quality.py --text FILE ARTIFACT...`

On a text, scores what `llama-perplexity --kl-divergence` scores: chunks of 512 tokens, each begun with BOS, the second half
of each. `--text heldout` takes the shipped held-out prompts in the same way. An ONNX artifact is run twice: with its
int8 products in float32 (accuracy level 1), and as onnxruntime runs it by default. llama.cpp's figures are those of
tiny-jamba's card, measured with llama.cpp on the text the model's training left out, and are printed for that model only.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from machine import describe_machine

from compress import prompts
from compress.check import baseline, metrics
from compress.checkpoint.reader import Checkpoint
from compress.model import sizes
from compress.prompts import PromptSet
from compress.recipe import resources, source
from compress.runtime.artifacts import CheckpointArtifact, find_artifact
from compress.runtime.candidates import CheckpointCandidate, OnnxCandidate

JAMBA = "tiny-jamba"
LENGTH, CHUNKS = 512, 48
FIRST = LENGTH // 2  # positions from here on are scored
LEVEL_1 = {"session.qdq_matmulnbits_accuracy_level": "1"}
# of tiny-jamba; type: (bytes of the file, mean KL), llama.cpp as of llama-cpp-python 0.3.36, on 48 chunks of the model's held-out books
LLAMA_CPP = {
    "Q8_0": (8_067_232, 0.00046),
    "Q5_1": (5_891_488, 0.0040),
    "Q5_0": (5_456_416, 0.0054),
    "Q4_1": (5_021_344, 0.0172),
    "Q4_0": (4_586_272, 0.0194),
}


def chunks(tokenizer, text: str) -> list[torch.Tensor]:
    """Consecutive chunks of the text (BOS before it), the first token of each replaced by BOS."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    whole = [torch.tensor(ids[start : start + LENGTH]) for start in range(0, len(ids) - LENGTH + 1, LENGTH)][:CHUNKS]
    for chunk in whole:
        chunk[0] = tokenizer.bos_token_id
    return whole


def scores(candidate, prompt_set: PromptSet, base: baseline.Baseline) -> dict[str, float]:
    pieces = []
    for window, start, logits in candidate.logits(prompt_set.windows, "prefill", lambda tokens: None):
        skip = max(0, FIRST - start)
        if skip >= len(logits):
            continue
        stop = start + len(logits)
        targets = prompt_set.windows[window][start + skip + 1 : stop + 1]
        with torch.inference_mode():
            pieces.append(metrics.score(base.log_probs(window, start + skip, stop), logits[skip:], targets))
    return metrics.summarize(metrics.Scores.concatenate(pieces))


def measure(path: Path, prompt_set: PromptSet, base: baseline.Baseline) -> dict:
    """Bytes and metrics of one artifact."""
    artifact = find_artifact(path)
    if artifact.suffix != ".onnx":
        model = Checkpoint(artifact, allow_quantized=True).model
        found = {"checkpoint": scores(CheckpointCandidate(model), prompt_set, base)}
        return {"weight_bytes": sizes.stored_bytes(model.units), "graph_bytes": 0, "runs": found}
    from exporters.onnx import Onnx, Options

    described = Onnx(Options()).describe(artifact.parent)
    runs = {
        name: scores(OnnxCandidate(artifact, options), prompt_set, base)
        for name, options in (("accuracy level 1", LEVEL_1), ("default", {}))
    }
    total = described.bytes(artifact.parent)
    return {"weight_bytes": described.weight_bytes, "graph_bytes": total - described.weight_bytes, "runs": runs}


def table(results: dict[str, dict], llama_cpp: dict[str, tuple[int, float]]) -> str:
    lines = ["| artifact | run | weight bytes | graph bytes | mean KL | KL p99 | same top-1 | perplexity ratio |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name, result in results.items():
        for run, m in result["runs"].items():
            lines.append(
                f"| {name} | {run} | {result['weight_bytes']:,} | {result['graph_bytes']:,} | "
                f"{m['kl_divergence_mean']:.5f} | {m['kl_divergence_p99']:.4f} | {m['top1_agreement']:.4f} | "
                f"{m['perplexity_ratio']:.4f} |"
            )
    lines += [f"| llama.cpp {name} | | {size:,} (file) | | {kl} | | | |" for name, (size, kl) in llama_cpp.items()]
    return "\n".join(lines)


def load_text(name: str) -> str:
    if name == "heldout":
        return "\n\n".join(prompts.passages.shipped("heldout"))
    return Path(name).read_text(encoding="utf-8")


def prepare(text: str, model: Path) -> tuple[PromptSet, baseline.Baseline]:
    """The chunks of a text and the original's log-probabilities on them."""
    prompt_set = PromptSet("text", chunks(source.load_tokenizer(model), load_text(text)))
    original = CheckpointArtifact(Checkpoint(model))
    return prompt_set, baseline.compute(original.candidate(), original.sha256(), prompt_set)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--text", required=True, help="A text file, or heldout.")
    parser.add_argument("-m", "--model", type=Path, default=resources.folder("models") / JAMBA)
    arguments = parser.parse_args()
    prompt_set, base = prepare(arguments.text, arguments.model)
    results = {str(path): measure(path, prompt_set, base) for path in arguments.artifacts}
    print(table(results, LLAMA_CPP if arguments.model.name == JAMBA else {}))
    print(json.dumps({"machine": describe_machine(), "chunks": len(prompt_set.windows)}), file=sys.stderr)


if __name__ == "__main__":
    main()
