"""How much of a checkpoint's divergence is where its routers choose other experts: `python benchmarks/routing_flips.py CHECKPOINT...`

Over every position of the shipped held-out prompts, in chunks of 512 tokens. A position counts where any layer sends it to
another set of experts than the original does.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from machine import describe_machine
from quality import JAMBA, LENGTH, chunks, load_text

from compress.checkpoint.reader import Checkpoint
from compress.model.routing import Router
from compress.recipe import resources, source
from compress.runtime.candidates import CheckpointCandidate


@contextmanager
def recorded_choices() -> Iterator[list[torch.Tensor]]:
    """Numbers of the experts of every token [tokens, top_k], as often as a router chooses: layer by layer, in order."""
    found: list[torch.Tensor] = []
    choice = Router.choice

    def recording(self: Router, logits: torch.Tensor, experts: int, bias: torch.Tensor | None = None):
        weights, chosen = choice(self, logits, experts, bias)
        found.append(chosen.reshape(-1, self.top_k).sort(-1).values)
        return weights, chosen

    with mock.patch.object(Router, "choice", recording):
        yield found


@torch.inference_mode()
def run(folder: Path, windows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [windows, LENGTH, vocabulary] and chosen experts [layers, windows, LENGTH, top_k]."""
    model = Checkpoint(folder, allow_quantized=True).model
    found = torch.empty(len(windows), LENGTH, model.config.vocab_size)
    with recorded_choices() as choices:
        for window, start, logits in CheckpointCandidate(model).logits(windows, "prefill", lambda tokens: None):
            found[window, start : start + len(logits)] = torch.log_softmax(logits.float(), dim=-1)
    routers = sum(layer.experts is not None for layer in model.layers)
    return found, torch.cat(choices).reshape(routers, len(windows), LENGTH, -1)


def row(name: str, original: tuple[torch.Tensor, torch.Tensor], candidate: tuple[torch.Tensor, torch.Tensor]) -> str:
    (log_p, chosen), (log_q, others) = original, candidate
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    moved = (chosen != others).any(-1).any(0)
    share = divergence[moved].sum() / divergence.sum()
    return f"| {name} | {divergence.mean():.5f} | {moved.float().mean():.4f} | {share:.2f} | {divergence[~moved].mean():.5f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("-m", "--model", type=Path, default=resources.folder("models") / JAMBA)
    arguments = parser.parse_args()
    windows = chunks(source.load_tokenizer(arguments.model), load_text("heldout"))[: arguments.chunks]
    original = run(arguments.model, windows)
    print(
        "| checkpoint | mean KL | positions with other experts | their share of the KL | mean KL elsewhere |\n"
        + "|---" * 5
        + "|"
    )
    for checkpoint in arguments.checkpoints:
        print(row(str(checkpoint), original, run(checkpoint, windows)), flush=True)
    print(json.dumps(describe_machine()), file=sys.stderr)


if __name__ == "__main__":
    main()
