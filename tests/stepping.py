"""Our own forward over batches of tokens given in pieces, states handed from piece to piece: what decode is."""

import torch

from compress.runtime.eager import Eager
from compress.runtime.inference import Head, embed, empty_state, layer_weights


def own_logits(model, ids, cuts, mask=None):
    """ids [B, S] in pieces that end at `cuts`; mask [B, S] -> logits [B, S, V]."""
    states = [empty_state(layer, len(ids), "cpu") for layer in model.layers]
    outputs, start = [], 0
    for end in cuts:
        hidden = embed(model, ids[:, start:end])
        for layer in model.layers:
            ops = Eager(layer_weights(model, layer.index, "cpu"), None if mask is None else mask[:, :end])
            hidden, states[layer.index] = layer.run(ops, hidden, states[layer.index])
        outputs.append(Head(model, "cpu")(hidden))
        start = end
    return torch.cat(outputs, 1)
