"""MoE feed-forwards of transformers' Jamba in the sizes that pruning left, for `compress.load`.

Its modelling code takes one number of experts from the configuration and gives every router as many rows.
"""

import copy

import torch
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock, JambaTopKRouter


class KeptRowsRouter(JambaTopKRouter):
    """A router that still has the rows of experts that were removed, after those of the experts that are there."""

    def __init__(self, config, rows: int):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.empty(rows, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[tokens, H] -> logits [tokens, R], then weights and numbers of the experts chosen, [tokens, top-k] each.

        As the class above it, but only the first E are chosen from: the others count in the denominator.
        """
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)[:, : self.num_experts]
        weights, chosen = torch.topk(probabilities, self.top_k, dim=-1)
        return logits, weights.to(hidden_states.dtype), chosen


def replace(model, index: int, experts: int, rows: int) -> None:
    """Puts an MoE block of `experts` experts and a router of `rows` rows, empty, in place of the layer's own."""
    config = copy.deepcopy(model.config)
    config.num_experts = experts
    block = JambaSparseMoeBlock(config)
    if rows != experts:
        block.router = KeptRowsRouter(config, rows)
    block.experts.config = model.config  # where it looks up how experts are computed, which a user may set later
    model.model.layers[index].feed_forward = block.to(model.dtype)
