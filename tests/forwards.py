"""Our own forward beside transformers': cases to compare, the direct forward, and what agreement means."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from compress.checkpoint.reader import Checkpoint
from compress.model.hybrid import HybridModel
from compress.runtime.eager import Eager
from compress.runtime.inference import Head, embed, empty_state, layer_weights

AGREEMENT = 1e-4  # largest difference between logits of the two: the project's requirement on float32 arithmetic


@dataclass(frozen=True)
class Case:
    """A checkpoint opened by us, tokens, and what transformers computes from them in one go."""

    folder: Path
    model: HybridModel
    ids: torch.Tensor
    logits: torch.Tensor
    states: list[dict[str, torch.Tensor]] | None


def make_case(folder: Path, ids: torch.Tensor, load_reference: Callable[[Path], PreTrainedModel]) -> Case:
    model = Checkpoint(folder).model
    kinds = [layer.kind for layer in model.layers]
    has_cache = "attention" in kinds  # without attention, transformers' cache does not know its length and refuses
    with torch.inference_mode():
        output = load_reference(folder)(ids, use_cache=has_cache)
    states = [_reference_state(layer) for layer in output.past_key_values.layers] if has_cache else None
    return Case(folder, model, ids, output.logits, states)


def _reference_state(layer) -> dict[str, torch.Tensor]:
    """A layer of transformers' cache in our layout; its convolution state holds one input more than is needed."""
    if hasattr(layer, "conv_states"):
        conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
        return {"conv_state": conv[:, :, 1:], "recurrent_state": recurrent.transpose(-1, -2)}
    return {"key": layer.keys, "value": layer.values} if getattr(layer, "keys", None) is not None else {}


@functools.cache
def tokens(vocabulary: int, length: int, batch: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(7))


class Run:
    """The direct forward: every layer in turn, its states carried from call to call."""

    def __init__(self, model: HybridModel, batch: int):
        layers = range(model.config.num_hidden_layers)
        self.model, self.head = model, Head(model, "cpu")
        self.weights = [layer_weights(model, i, "cpu") for i in layers]
        self.states = [empty_state(layer, batch, "cpu") for layer in model.layers]

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = embed(self.model, ids)
        for i, weights in enumerate(self.weights):
            hidden, self.states[i] = self.model.layer(i).run(Eager(weights, mask), hidden, self.states[i])
        return self.head(hidden)


def run_of(case: Case) -> Run:
    """One that has seen nothing yet, for as many rows as the case has."""
    return Run(case.model, len(case.ids))


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= AGREEMENT


def assert_states_agree(states: list[dict], expected: list[dict] | None):
    for ours, theirs in zip(states, expected or states, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_agrees(ours[name], theirs[name])


def in_pieces(run: Run, ids: torch.Tensor, sizes) -> torch.Tensor:
    return torch.cat([run(piece) for piece in ids.split(sizes, 1)], 1)


def left_padded(ids: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's first tokens pushed to the right; the padding before them is token 5, any other would do."""
    width = max(lengths)
    padded, mask = torch.full((len(ids), width), 5), torch.zeros(len(ids), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        padded[row, width - length :] = ids[row, :length]
        mask[row, width - length :] = 1
    return padded, mask


def assert_real_tokens_agree(logits: torch.Tensor, lengths: list[int], expected: torch.Tensor):
    assert logits.isfinite().all()
    for row, length in enumerate(lengths):
        assert_agrees(logits[row, -length:], expected[row, :length])
