"""The largest magnitudes among hidden states and what is computed of them, unit by unit, over calibration tokens: what a type
with a short range must hold.

The model runs in prefill, layer by layer, with its weights and rounded inputs as they are stored; hidden states wait on disk.
Of a sum of many terms only the result is heard (`listening.py` says what is): whoever uses these leaves room.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch

from compress import parallel
from compress.arithmetic.norm import rms_norm
from compress.calibration.listening import Ear, Listening, Peak
from compress.formats import hadamard
from compress.model.hybrid import HybridModel
from compress.runtime.inference import Advance, Head, HiddenStates, embed, empty_state, kept_bytes, layer_weights
from compress.runtime.pieces import HEAD_BYTES, rows_within
from compress.terminal import progress

STAGE = "largest values"
ENTERING = "the hidden states that enter it"


@dataclass(frozen=True)
class Ranges:
    """Peaks by unit, in order, and how many tokens gave them."""

    peaks: Mapping[str, Peak]
    tokens: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        read = json.loads(text)
        return cls({unit: Peak(**peak) for unit, peak in read["peaks"].items()}, read["tokens"])


def bytes_needed(model: HybridModel, tokens: int) -> int:
    """On disk, while they are measured."""
    return 4 * tokens * model.config.hidden_size


@parallel.steady()
@torch.inference_mode()
def measured(model: HybridModel, windows: list[torch.Tensor], folder: Path, device: str = "cpu") -> Ranges:
    """`folder` is made, and removed. Raises InputError where a value is NaN or infinite."""
    tokens, layers = sum(map(len, windows)), model.config.num_hidden_layers
    states = HiddenStates(folder, windows, model.config.hidden_size).at(folder)
    with progress.task(STAGE, tokens * (layers + 1)) as advance:
        peaks = {"embedding": _embedding(model, windows, states)}
        for index in range(layers):
            peaks[f"layer.{index}"] = _layer(model, index, states, device, advance)
        peaks["head"] = _head(model, states, device, advance)
    shutil.rmtree(folder)
    return Ranges(peaks, tokens)


def _embedding(model: HybridModel, windows: list[torch.Tensor], states: HiddenStates) -> Peak:
    ear = Ear("embedding")
    for number, block in enumerate(states.blocks):
        hidden = embed(model, torch.stack([windows[i] for i in block]))
        states.write(number, ear.hear(hidden, f"the rows of '{model.embedding.name}'"))
    return ear.peak


def _layer(model: HybridModel, index: int, states: HiddenStates, device: str, advance: Advance) -> Peak:
    layer, unit, ear = model.layer(index), model.unit(f"layer.{index}"), Ear(f"layer.{index}")
    weights = layer_weights(model, index, device, kept_bytes(device))
    for number in range(len(states)):
        hidden = ear.hear(states.read(number).to(device), ENTERING)
        windows, length, _ = hidden.shape
        ops = Listening(unit, layer.prefix, weights, ear, length)
        states.write(number, layer.run(ops, hidden, empty_state(layer, windows, device))[0])
        advance(windows * length)
    return ear.peak


def _head(model: HybridModel, states: HiddenStates, device: str, advance: Advance) -> Peak:
    head, ear, matrix = Head(model, device, kept_bytes(device)), Ear("head"), model.output_matrix
    norm, eps = model.final_norm.dense().to(device), model.config.rms_norm_eps
    for hidden in states.read_all():
        for rows in hidden.flatten(0, 1).to(device).split(rows_within(HEAD_BYTES, head.vocab_size)):
            normed = ear.hear(rms_norm(ear.hear(rows, ENTERING), norm, eps), f"the norm '{model.final_norm.name}'")
            if matrix.rotation:
                ear.hear(hadamard.rotate(normed, matrix.rotation), f"the rotated input of '{matrix.name}'")
            ear.hear(head(rows), f"the output of '{matrix.name}'")
        advance(hidden.shape[0] * hidden.shape[1])
    return ear.peak
