"""MoE feed-forwards of transformers' Jamba in the sizes that pruning left, and with our choice between equal experts, for
`compress.load`.

Its modelling code takes one number of experts from the configuration and gives every router as many rows.
"""

import copy

import torch
from transformers import JambaConfig, PreTrainedModel
from transformers.models.jamba.modeling_jamba import JambaSparseMoeBlock, JambaTopKRouter

from compress.model import routing
from compress.model.experts import Experts


class Router(JambaTopKRouter):
    """A router that may still have the rows of experts that were removed, after those of the experts that are there."""

    def __init__(self, config: JambaConfig, ours: routing.Router):
        super().__init__(config)
        self.ours = ours
        self.weight = torch.nn.Parameter(torch.empty(ours.rows, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[tokens, H] -> logits [tokens, R], then weights and numbers of the experts chosen, [tokens, top-k] each.

        As the class above it, but of equal experts the lower number is chosen, and only the first E are chosen from: the
        others count in the denominator.
        """
        logits = routing.logits(hidden_states, self.weight)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
        chosen = routing.choose(logits[:, : self.num_experts], self.top_k)
        return logits, probabilities.gather(-1, chosen).to(hidden_states.dtype), chosen


def replace(model: PreTrainedModel, index: int, experts: Experts) -> None:
    """Puts an MoE block of these experts and a router of their rows, empty, in place of the layer's own."""
    config = copy.deepcopy(model.config)
    config.num_experts = experts.count
    block = JambaSparseMoeBlock(config)
    block.router = Router(config, experts.router)
    block.experts.config = model.config  # where it looks up how experts are computed, which a user may set later
    model.model.layers[index].feed_forward = block.to(model.dtype)
