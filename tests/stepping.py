"""Our own forward over batches of tokens given in pieces, states handed from piece to piece: what decode is."""

import torch

from compress.runtime.eager import Eager
from compress.runtime.inference import Head, embed, empty_state, layer_weights


class OwnSteps:
    """`step(ids [B, S], mask [B, all tokens])` returns logits [B, S, V]; `states` by layer and name."""

    def __init__(self, model):
        self.model, self.read = model, 0
        self.states: list[dict[str, torch.Tensor]] = []
        self._weights = [layer_weights(model, layer.index, "cpu") for layer in model.layers]
        self._head = Head(model, "cpu")

    @torch.inference_mode()
    def step(self, ids, mask=None):
        self.states = self.states or [empty_state(layer, len(ids), "cpu") for layer in self.model.layers]
        self.read += ids.shape[1]
        hidden = embed(self.model, ids)
        for layer, weights in zip(self.model.layers, self._weights, strict=True):
            ops = Eager(weights, mask, total=self.read)
            hidden, self.states[layer.index] = layer.run(ops, hidden, self.states[layer.index])
        return self._head(hidden)


def own_logits(model, ids, cuts, mask=None):
    """ids [B, S] in pieces that end at `cuts`; mask [B, S] -> logits [B, S, V]."""
    steps, outputs, start = OwnSteps(model), [], 0
    for end in cuts:
        outputs.append(steps.step(ids[:, start:end], None if mask is None else mask[:, :end]))
        start = end
    return torch.cat(outputs, 1)
